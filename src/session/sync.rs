//! SYNC: a channel's members, in pages (§2.7).

use crate::wire::ably::{Action, Frame, PresenceAction, PresenceMessage};

/// Members in one frame.
const PAGE: usize = 100;
/// And about the bytes of their data: client libraries take frames of a megabyte at most, and data grows as JSON.
const PAGE_BYTES: usize = 64 << 10;

/// Names one SYNC, apart from every other that the client may still be receiving, of an earlier session too.
/// Client libraries take `[\w-]+` before the colon.
pub(super) fn token(now_ms: u64, number: u64) -> String {
    format!("{now_ms:x}-{number:x}")
}

/// At least one page; the last one has no cursor.
pub(super) fn pages(channel: &str, members: Vec<PresenceMessage>, token: &str) -> Vec<Frame> {
    let count = members.len();
    let mut rest = members.into_iter().peekable();
    let (mut pages, mut listed) = (Vec::new(), 0);
    while pages.is_empty() || rest.peek().is_some() {
        let (mut page, mut bytes) = (Vec::new(), 0);
        while let Some(member) = rest.next_if(|member| {
            bytes += member.size();
            page.is_empty() || (page.len() < PAGE && bytes <= PAGE_BYTES)
        }) {
            page.push(PresenceMessage {
                action: Some(PresenceAction::Present),
                ..member
            });
        }
        listed += page.len();
        let cursor = (listed < count).then(|| listed.to_string());
        pages.push(Frame {
            channel_serial: Some(format!("{token}:{}", cursor.unwrap_or_default())),
            presence: page,
            ..Frame::of_channel(Action::Sync, channel)
        });
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ably::Data;

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
    fn large_members_make_short_pages() {
        let member = |bytes: usize| PresenceMessage {
            data: Some(Data::Text("x".repeat(bytes))),
            ..PresenceMessage::default()
        };
        let sizes = [30_000, 30_000, 30_000, 70_000, 1, 1].map(member);
        let pages = pages("c", sizes.to_vec(), "t");
        let listed = pages.iter().map(|page| page.presence.len());
        assert_eq!(listed.collect::<Vec<_>>(), [2, 1, 1, 2]);
        let cursors = pages
            .iter()
            .map(|page| page.channel_serial.as_deref().unwrap());
        assert_eq!(cursors.collect::<Vec<_>>(), ["t:2", "t:3", "t:4", "t:"]);
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
