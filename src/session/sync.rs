//! SYNC: a channel's members, in pages (§2.7).

use crate::wire::ably::{Action, Frame, PresenceAction, PresenceMessage};

/// Members in one frame.
const PAGE: usize = 100;

/// Names one SYNC, apart from every other that the client may still be receiving, of an earlier session too.
/// Client libraries take `[\w-]+` before the colon.
pub(super) fn token(now_ms: u64, number: u64) -> String {
    format!("{now_ms:x}-{number:x}")
}

/// At least one page; the last one has no cursor.
pub(super) fn pages(channel: &str, members: Vec<PresenceMessage>, token: &str) -> Vec<Frame> {
    let count = members.len();
    let mut rest = members.into_iter().map(|member| PresenceMessage {
        action: Some(PresenceAction::Present),
        ..member
    });
    let page = |first: usize| {
        let cursor = first + PAGE;
        let cursor = (cursor < count).then(|| cursor.to_string());
        Frame {
            channel_serial: Some(format!("{token}:{}", cursor.unwrap_or_default())),
            presence: rest.by_ref().take(PAGE).collect(),
            ..Frame::of_channel(Action::Sync, channel)
        }
    };
    (0..count.max(1)).step_by(PAGE).map(page).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_of_a_hundred_and_the_last_has_no_cursor() {
        for (members, cursors) in [
            (0, &["t:"][..]),
            (1, &["t:"]),
            (100, &["t:"]),
            (101, &["t:100", "t:"]),
            (250, &["t:100", "t:200", "t:"]),
        ] {
            let all: Vec<_> = (0..members)
                .map(|n: usize| PresenceMessage {
                    client_id: Some(n.to_string()),
                    action: Some(PresenceAction::Enter),
                    ..PresenceMessage::default()
                })
                .collect();
            let pages = pages("[?a]c", all, "t");
            let seen: Vec<_> = pages
                .iter()
                .map(|p| p.channel_serial.as_deref().unwrap())
                .collect();
            assert_eq!(seen, cursors);
            let listed = pages.iter().flat_map(|page| &page.presence);
            for (n, member) in listed.clone().enumerate() {
                assert_eq!(member.client_id.as_deref(), Some(&*n.to_string()));
                assert_eq!(member.action, Some(PresenceAction::Present));
            }
            assert_eq!(listed.count(), members);
            assert!(
                pages
                    .iter()
                    .all(|page| page.channel.as_deref() == Some("[?a]c"))
            );
        }
    }

    #[test]
    fn a_token_is_what_client_libraries_can_read() {
        let token = token(1_795_309_503_110, 31);
        assert!(
            token
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-'),
            "{token}"
        );
        assert_ne!(token, super::token(1_795_309_503_110, 32));
    }
}
