//! What a call carries: pieces that follow each other, so that large ones are handed over as they are.

use bytes::Bytes;

/// The bytes of a call or of its answer, one piece after the other.
#[derive(Clone, Debug, Default)]
pub struct Body {
    pieces: Vec<Bytes>,
    length: usize,
}

impl Body {
    /// Appends a piece.
    pub fn push(&mut self, piece: Bytes) {
        self.length += piece.len();
        self.pieces.push(piece);
    }

    /// Bytes of all pieces.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.length
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// In their order.
    #[must_use]
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }
}

impl From<Bytes> for Body {
    fn from(piece: Bytes) -> Self {
        Self {
            length: piece.len(),
            pieces: vec![piece],
        }
    }
}

impl From<Vec<u8>> for Body {
    fn from(piece: Vec<u8>) -> Self {
        Bytes::from(piece).into()
    }
}
