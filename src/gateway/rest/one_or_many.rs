//! What a client may send alone or as an array.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer, StrDeserializer};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::wire::ably::Few;

/// The values, one of them when no array came.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct OneOrMany<T>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(PhantomData<T>);

        impl<T> Either<T> {
            fn one(value: T) -> OneOrMany<T> {
                OneOrMany(vec![value])
            }
        }

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one value or an array of them")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<OneOrMany<T>, E> {
                T::deserialize(StrDeserializer::new(text)).map(Self::one)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OneOrMany<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Self::one)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<OneOrMany<T>, A::Error> {
                let many: Few<T> = Few::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(OneOrMany(many.0))
            }
        }

        deserializer.deserialize_any(Either(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ably::{Data, Format, Message, decode_value, encode_value};

    #[test]
    fn one_or_many_in_both_formats() {
        let one = serde_json::json!({"data": "x"});
        for (value, count) in [
            (one.clone(), 1),
            (serde_json::json!([one, one]), 2),
            (serde_json::json!([]), 0),
        ] {
            for format in [Format::Json, Format::MsgPack] {
                let bytes = encode_value(format, &value);
                let read: OneOrMany<Message> = decode_value(format, &bytes).unwrap();
                assert_eq!(read.0.len(), count);
                let text = |it: &Message| it.data == Some(Data::Text("x".into()));
                assert!(read.0.iter().all(text));
            }
        }
        let names: OneOrMany<String> = decode_value(Format::Json, b"\"a\"").unwrap();
        assert_eq!(names.0, ["a"]);
        for bad in ["1", "null", "[1]", "{}"] {
            assert!(
                decode_value::<OneOrMany<String>>(Format::Json, bad.as_bytes()).is_err(),
                "{bad}"
            );
        }
    }
}
