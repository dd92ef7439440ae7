//! What may happen once in the whole cluster: texts that are remembered in the log, under an app that no client belongs to.

use std::time::Duration;

use bytes::Bytes;

use crate::broker::{Broker, Publish};
use crate::channel::RETENTION_MIN;
use crate::types::{AppId, ChannelKey, ChannelName, ErrorCode, ErrorInfo, Kinds, Range, Serial};
use crate::wire::ably::{Data, Message};
use crate::wire::body::{decode_body, encode_body};
use crate::wire::control;

/// The cluster's own app. The door lets nobody in for it, so no client can name its channels.
const APP: &str = "_firth";

/// A text that may count once.
#[derive(Clone, Debug)]
pub struct Once<'a> {
    /// Texts of one kind are apart from those of others. Part of a channel's name.
    pub kind: &'a str,
    pub text: &'a str,
    /// Unlike that of any other call: tells this call's own mark, which came twice, from another's.
    pub mark: String,
    /// How long it must be remembered; at least two minutes are.
    pub remembered: Duration,
}

impl Broker {
    /// Whether an app is the cluster's own: nobody may be let in for it.
    #[must_use]
    pub fn is_internal(app: &AppId) -> bool {
        app.as_str() == APP
    }

    /// Whether this is the first call with this text, on whichever node. It is remembered on a majority by then.
    ///
    /// # Errors
    /// When that cannot be found out; the text may count as used then.
    pub async fn once(&self, once: Once<'_>) -> Result<bool, ErrorInfo> {
        let unnamed = |what: String| ErrorInfo::new(ErrorCode::Internal, what);
        let name = ChannelName::parse(once.kind).map_err(|err| unnamed(err.to_string()))?;
        let app = APP
            .parse::<AppId>()
            .map_err(|err| unnamed(err.to_string()))?;
        let key = ChannelKey { app, name };
        let remembered = once.remembered.max(RETENTION_MIN).as_millis();
        let rule = control::Namespace {
            retention_ms: u64::try_from(remembered).unwrap_or(u64::MAX),
            ..control::Namespace::default()
        };
        let publish = Publish {
            key: key.clone(),
            id: once.text.to_owned(),
            connection_id: String::new(),
            count: 1,
            body: marked(&once.mark),
            source: None,
            presence: None,
            ephemeral: false,
        };
        match self.publish_by(publish, &rule).outcome().await? {
            (_, false) => Ok(true),
            (None, true) => Ok(false),
            (Some(first), true) => self.is_marked(&key, first, &once.mark).await,
        }
    }

    /// Whether the record at `serial` has this mark: a publish that was repeated inside the cluster finds itself.
    async fn is_marked(
        &self,
        key: &ChannelKey,
        serial: Serial,
        mark: &str,
    ) -> Result<bool, ErrorInfo> {
        let range = Range {
            from: Some(serial),
            to: Some(serial),
            ..Range::ALL
        };
        let (records, _) = self.history(key, &range, Kinds::Messages, 1).await?;
        let Some(record) = records.first() else {
            return Ok(false);
        };
        let messages = decode_body(&record.publish.body)?;
        let data = messages.first().and_then(|message| message.data.as_ref());
        Ok(data == Some(&Data::Text(mark.to_owned())))
    }
}

fn marked(mark: &str) -> Bytes {
    encode_body(&[Message {
        data: Some(Data::Text(mark.to_owned())),
        ..Message::default()
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clusters_own_app_has_a_name_that_it_can_have() {
        let app: AppId = APP.parse().unwrap();
        assert!(Broker::is_internal(&app));
        assert!(!Broker::is_internal(&"firth".parse().unwrap()));
    }

    #[test]
    fn a_mark_is_read_back() {
        let messages = decode_body(&marked("m")).unwrap();
        assert_eq!(messages[0].data, Some(Data::Text("m".into())));
    }
}
