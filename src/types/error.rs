//! The one closed table of errors that clients see. Every door maps its failures through it.

use std::fmt;

/// What a client should do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same request will fail again.
    Never,
    /// The same request may succeed later; nothing was stored.
    Later,
    /// Get a new token, then the same request may succeed.
    WithNewToken,
    /// The request may or may not have taken effect; repeat it with the same id.
    Unknown,
}

macro_rules! error_codes {
    ($($name:ident = $code:literal, $status:literal, $retry:ident, $text:literal;)*) => {
        /// A failure as the client protocol numbers it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorCode { $(#[doc = $text] $name,)* }

        impl ErrorCode {
            /// Every row, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The number in `error.code`.
            #[must_use]
            pub const fn code(self) -> u32 { match self { $(Self::$name => $code,)* } }

            /// The HTTP status, also sent as `error.statusCode`.
            #[must_use]
            pub const fn status(self) -> u16 { match self { $(Self::$name => $status,)* } }

            #[must_use]
            pub const fn retry(self) -> Retry { match self { $(Self::$name => Retry::$retry,)* } }

            /// What happened, in a few words.
            #[must_use]
            pub const fn text(self) -> &'static str { match self { $(Self::$name => $text,)* } }

            /// The row with this number.
            #[must_use]
            pub fn from_code(code: u32) -> Option<Self> {
                Self::ALL.iter().copied().find(|row| row.code() == code)
            }
        }
    };
}

error_codes! {
    BadRequest            = 40000, 400, Never,        "bad request";
    InvalidBody           = 40001, 400, Never,        "body or frame could not be decoded";
    InvalidParameter      = 40003, 400, Never,        "invalid parameter value";
    InvalidCredentialForm = 40005, 400, Never,        "credential is malformed";
    InvalidConnectionKey  = 40006, 400, Never,        "invalid connection key in a message";
    MessageTooLarge       = 40009, 413, Never,        "message is too large";
    InvalidChannelName    = 40010, 400, Never,        "invalid channel name";
    InvalidClientId       = 40012, 400, Never,        "invalid client id";
    InvalidMessageData    = 40013, 400, Never,        "invalid message data or encoding";
    UnsupportedVersion    = 40017, 400, Never,        "unsupported protocol version";
    BatchFailed           = 40020, 400, Never,        "a part of the batch failed; see its results";
    InvalidPublish        = 40030, 400, Never,        "invalid publish request";
    InvalidMessageId      = 40031, 400, Never,        "invalid message id";
    InvalidExtras         = 40032, 400, Never,        "invalid extras of a message";
    TooManyMessages       = 40034, 400, Never,        "too many messages in one publish";
    ForcedNack            = 40099, 400, Never,        "refused because the client asked for it";
    Unauthorized          = 40100, 401, Never,        "unauthorized";
    InvalidCredentials    = 40101, 401, Never,        "invalid credentials";
    IncompatibleCredentials = 40102, 401, Never,      "incompatible credentials";
    TokenRequestTimestamp = 40104, 401, Never,        "timestamp of the token request is not current";
    TokenRequestReplayed  = 40105, 401, Never,        "token request was used before";
    KeyRevoked            = 40131, 401, Never,        "key was revoked";
    WrongKeyForRevocation = 40133, 401, Never,        "tokens are revoked with the key that issued them only";
    TokenRevoked          = 40141, 401, WithNewToken, "token was revoked";
    TokenExpired          = 40142, 401, WithNewToken, "token has expired";
    TokenUnrecognized     = 40143, 401, WithNewToken, "token not recognised";
    InvalidJwt            = 40144, 401, WithNewToken, "invalid JWT";
    CapabilityDenied      = 40160, 401, Never,        "operation not permitted by the capability";
    RevocationNeedsKey    = 40162, 401, Never,        "tokens are revoked with a key, not with a token";
    RevocationDisabled    = 40163, 401, Never,        "tokens of this key cannot be revoked";
    ModeDenied            = 40165, 401, Never,        "attachment was not granted this mode";
    NotFound              = 40400, 404, Never,        "not found";
    MethodNotAllowed      = 40500, 405, Never,        "method not allowed";
    RateLimited           = 42910, 429, Later,        "rate limit exceeded";
    ConnectionRateLimited = 42911, 429, Later,        "per-connection rate limit exceeded";
    ConnectionFlooded     = 42921, 429, Never,        "connection ignored its rate limit and was ended";
    Internal              = 50000, 500, Unknown,      "internal error";
    Timeout               = 50003, 503, Unknown,      "timed out; it may or may not have taken effect";
    Busy                  = 50004, 503, Later,        "busy; nothing was stored";
    NoLeader              = 50320, 503, Later,        "no leader for the channel at the moment; nothing was stored";
    Draining              = 50310, 503, Later,        "node is shutting down; connect to another";
    Disconnected          = 80003, 400, Later,        "disconnected";
    ResumeForbidden       = 80011, 400, Never,        "connection is another client's";
    ConnectionSuperseded  = 80016, 410, Never,        "another transport took this connection over";
    ResumeImpossible      = 80018, 400, Never,        "connection cannot be resumed";
    ContinuityLost        = 90003, 404, Never,        "messages after this serial are no longer retained";
    AttachPointGone       = 90008, 400, Never,        "history up to the attachment is no longer retained";
    TooManyChannels       = 90010, 400, Never,        "too many channels on one connection";
    PresenceWithoutClientId = 91000, 400, Never,      "presence needs a client id";
    PresenceNotAttached   = 91001, 400, Never,        "presence needs an attachment to the channel";
    TooManyMembers        = 91003, 400, Never,        "too many presence members on the channel";
    MessagesUnchangeable  = 93002, 400, Never,        "messages of the channel cannot be changed or annotated";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.text(), self.code())
    }
}

/// An error as a client receives it: a row of the table and what exactly was wrong this time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({})", code.code())]
pub struct ErrorInfo {
    pub code: ErrorCode,
    /// Lower-case, names what is wrong; never holds a secret.
    pub message: String,
}

impl ErrorInfo {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

impl From<ErrorCode> for ErrorInfo {
    fn from(code: ErrorCode) -> Self {
        Self::new(code, code.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_stands_once() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_code(code.code()), Some(*code));
            assert!((400..600).contains(&code.status()), "{code}");
        }
    }
}
