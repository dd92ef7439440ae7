//! What a client says about itself in the query of its WebSocket's URL (§2.2).

use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::Format;

/// Oldest protocol version that is spoken.
const VERSION_MIN: f64 = 2.0;

/// A connection's parameters. Credentials (`key`, `accessToken`) are the door's affair and not among them.
#[derive(Clone, Debug, PartialEq)]
pub struct ConnectParams {
    /// Protocol version; `None` when absent or not a number.
    pub version: Option<f64>,
    pub format: Format,
    /// Who the client wants to be.
    pub client_id: Option<String>,
    /// Whether its own messages come back to it.
    pub echo: bool,
    /// Whether it counts HEARTBEAT frames only. They are sent in any case: some libraries need them unasked.
    pub heartbeats: bool,
    /// Connection key of the connection to go on with.
    pub resume: Option<String>,
    /// The same, of another process's connection.
    pub recover: Option<String>,
    /// How long its presence members stay after its socket is gone, in milliseconds; `None`: as long as anybody's.
    pub remain_present_for_ms: Option<u64>,
}

impl Default for ConnectParams {
    /// What is so when a query says nothing.
    fn default() -> Self {
        Self {
            version: None,
            format: Format::Json,
            client_id: None,
            echo: true,
            heartbeats: false,
            resume: None,
            recover: None,
            remain_present_for_ms: None,
        }
    }
}

impl ConnectParams {
    /// From the pairs of a query, percent-decoded; unknown ones are ignored, of repeated ones the last counts.
    ///
    /// # Errors
    /// `InvalidParameter` for a format that is not spoken: no answer could be read.
    pub fn from_query<'a>(
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, ErrorInfo> {
        let mut params = Self::default();
        let some = |value: &str| (!value.is_empty()).then(|| value.to_owned());
        for (name, value) in pairs {
            match name {
                "v" => params.version = value.parse().ok(),
                "format" => params.format = format(value)?,
                "clientId" => params.client_id = some(value),
                "echo" => params.echo = value != "false",
                "heartbeats" => params.heartbeats = value == "true",
                "resume" => params.resume = some(value),
                "recover" => params.recover = some(value),
                "remainPresentFor" => params.remain_present_for_ms = value.parse().ok(),
                _ => {}
            }
        }
        Ok(params)
    }

    /// The connection key that the client wants to go on with, whichever way it asks.
    #[must_use]
    pub fn resume_key(&self) -> Option<&str> {
        self.resume.as_deref().or(self.recover.as_deref())
    }

    /// # Errors
    /// `UnsupportedVersion` when the version is missing or too old. Newer ones are welcome: the protocol grows by
    /// what older servers may ignore.
    pub fn check_version(&self) -> Result<(), ErrorInfo> {
        match self.version {
            Some(version) if version >= VERSION_MIN => Ok(()),
            Some(version) => Err(unsupported(&format!(
                "protocol version {version} is too old; 2 is the oldest"
            ))),
            None => Err(unsupported("the query names no protocol version (`v`)")),
        }
    }
}

fn format(text: &str) -> Result<Format, ErrorInfo> {
    match text {
        "json" => Ok(Format::Json),
        "msgpack" => Ok(Format::MsgPack),
        _ => Err(ErrorInfo::new(
            ErrorCode::InvalidParameter,
            "format is neither `json` nor `msgpack`",
        )),
    }
}

fn unsupported(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::UnsupportedVersion, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_as_captured() {
        let query = [
            ("key", "app.key:secret"),
            ("clientId", "me"),
            ("format", "json"),
            ("heartbeats", "false"),
            ("v", "6"),
            ("agent", "ably-js/2.28.0"),
            ("resume", "conn1!key"),
            ("echo", "false"),
            ("remainPresentFor", "0"),
        ];
        let params = ConnectParams::from_query(query).unwrap();
        let expected = ConnectParams {
            version: Some(6.0),
            client_id: Some("me".into()),
            echo: false,
            resume: Some("conn1!key".into()),
            remain_present_for_ms: Some(0),
            ..ConnectParams::default()
        };
        assert_eq!(params, expected);
        assert_eq!(params.resume_key(), Some("conn1!key"));
        let params =
            ConnectParams::from_query([("format", "msgpack"), ("recover", "k"), ("clientId", "")])
                .unwrap();
        assert_eq!(
            (
                params.format,
                params.resume_key(),
                params.client_id.as_deref()
            ),
            (Format::MsgPack, Some("k"), None)
        );
        assert!(ConnectParams::from_query([("format", "xml")]).is_err());
    }

    #[test]
    fn versions_from_two_up_are_spoken() {
        let check = |v| {
            ConnectParams::from_query([("v", v)])
                .unwrap()
                .check_version()
        };
        for good in ["2", "6", "2.1", "7", "100"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "1", "1.2", "x", "NaN", "-2"] {
            assert_eq!(
                check(bad).unwrap_err().code,
                ErrorCode::UnsupportedVersion,
                "{bad}"
            );
        }
    }
}
