//! Lists from outside, of which no more is kept than anybody may send.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, IgnoredAny, SeqAccess, Visitor};

/// Elements that are kept: one more than may be sent anywhere, so that whoever counts sees that there are too many.
const KEPT: usize = 1025;

/// The first elements of a list. `{}` takes two bytes of a frame and some hundred of memory: what is beyond the limit is
/// read over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Few<T>(pub Vec<T>);

impl<T> From<Few<T>> for Vec<T> {
    fn from(few: Few<T>) -> Self {
        few.0
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Few<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
            type Value = Few<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Few<T>, A::Error> {
                let mut kept = Vec::new();
                while kept.len() < KEPT {
                    match list.next_element()? {
                        Some(element) => kept.push(element),
                        None => return Ok(Few(kept)),
                    }
                }
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Few(kept))
            }
        }

        deserializer.deserialize_seq(List(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ably::{Format, Message, decode_value};

    #[test]
    fn what_is_beyond_the_limit_is_read_over() {
        let read = |count: usize| {
            let text = format!("[{}]", vec!["{}"; count].join(","));
            decode_value::<Few<Message>>(Format::Json, text.as_bytes()).map(|few| few.0.len())
        };
        for count in [0, 1, KEPT - 1, KEPT] {
            assert_eq!(read(count).unwrap(), count);
        }
        assert_eq!(read(100_000).unwrap(), KEPT);
        let broken = format!("[{},", vec!["{}"; KEPT + 1].join(","));
        assert!(decode_value::<Few<Message>>(Format::Json, broken.as_bytes()).is_err());
    }
}
