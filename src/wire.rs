//! Bytes ⇄ values: what crosses a socket or lies on a disk.

pub mod ably;
pub mod body;

/// Entries of a shard's Raft log (`proto/firth/entry.proto`).
pub mod entry {
    #![allow(missing_debug_implementations, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/firth.entry.v1.rs"));

    /// Version of [`Body`], and of an [`Entry`] in which nothing is that the first builds would apply differently.
    pub const VERSION: u32 = 1;

    /// Newest version of [`Entry`] that this build applies, and writes where a publish holds presence events: an older
    /// build would take them for messages.
    pub const VERSION_MAX: u32 = 2;

    /// The version of an entry with these publishes.
    #[must_use]
    pub fn version_of(publishes: &[Publish]) -> u32 {
        let present = publishes.iter().any(|publish| publish.presence.is_some());
        if present { VERSION_MAX } else { VERSION }
    }
}

/// Entries and snapshots of the control group (`proto/firth/control.proto`).
pub mod control {
    include!(concat!(env!("OUT_DIR"), "/firth.control.v1.rs"));

    /// Version of [`Entry`] and [`Snapshot`] that this build writes, and the newest it applies. 2: apps change.
    pub const VERSION: u32 = 2;

    /// Without the secret.
    impl std::fmt::Debug for Key {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Key")
                .field("id", &self.id)
                .field("capability", &self.capability)
                .field("revocable_tokens", &self.revocable_tokens)
                .finish_non_exhaustive()
        }
    }

    /// Without the secret.
    impl std::fmt::Debug for Bootstrap {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Bootstrap")
                .field("cluster_id", &self.cluster_id)
                .field("shards", &self.shards)
                .field("apps", &self.apps)
                .field("bridges", &self.bridges)
                .finish_non_exhaustive()
        }
    }
}

/// What nodes say to each other (`proto/firth/peer.proto`).
pub mod peer {
    include!(concat!(env!("OUT_DIR"), "/firth.peer.v1.rs"));

    /// Version of everything between nodes that this build speaks.
    pub const VERSION: u32 = 1;
}

/// State in log segments beside Raft entries (`proto/firth/segment.proto`).
pub mod segment {
    include!(concat!(env!("OUT_DIR"), "/firth.segment.v1.rs"));

    /// Version of the data directory that this build writes, and the newest it opens.
    pub const VERSION: u32 = 1;
}

/// Derived state in snapshots (`proto/firth/checkpoint.proto`).
pub mod checkpoint {
    include!(concat!(env!("OUT_DIR"), "/firth.checkpoint.v1.rs"));

    /// Version of [`Shard`] that this build writes, and the only one it reads.
    pub const VERSION: u32 = 3;
}
