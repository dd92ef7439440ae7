//! Decoding what many client libraries write in slightly different ways: maps with unknown keys, integers
//! of any width or written as floats, parameter values that are not text.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, Visitor};
use serde::{Deserialize, de};

/// Implements `Deserialize` for a struct with `Default` from a map with text keys: unknown keys are skipped,
/// null is absent, of a repeated key the last counts. Arrays are refused, unlike by the derived code,
/// which would read fields by place.
macro_rules! from_map {
    ($type:ident, $expecting:literal, { $($key:literal => $field:ident: $wire:ty,)* }) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;

                impl<'de> serde::de::Visitor<'de> for Visitor {
                    type Value = $type;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(
                        self,
                        mut map: A,
                    ) -> Result<$type, A::Error> {
                        const KEYS: &[&str] = &[$($key,)*];
                        let mut value = $type::default();
                        while let Some(key) = map.next_key_seed($crate::wire::ably::lenient::KeyIn(KEYS))? {
                            match key {
                                $(Some($key) => {
                                    value.$field = map.next_value::<Option<$wire>>()?.map(Into::into).unwrap_or_default();
                                })*
                                _ => {
                                    map.next_value::<serde::de::IgnoredAny>()?;
                                }
                            }
                        }
                        Ok(value)
                    }
                }

                deserializer.deserialize_map(Visitor)
            }
        }
    };
}

pub(super) use from_map;

/// Reads a map key without copying it: the equal one of these, or `None`.
pub(super) struct KeyIn(pub(super) &'static [&'static str]);

impl<'de> DeserializeSeed<'de> for KeyIn {
    type Value = Option<&'static str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyIn {
    type Value = Option<&'static str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().copied().find(|known| *known == key))
    }
}

/// An integer, however it was written: `7`, `7.0`, `uint64`, `float32`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Whole(pub(super) i64);

/// The largest integer below which every float is exact.
const FLOAT_EXACT_MAX: f64 = 9_007_199_254_740_992.0;

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WholeVisitor;

        impl Visitor<'_> for WholeVisitor {
            type Value = Whole;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer")
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Whole, E> {
                Ok(Whole(value))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Whole, E> {
                let whole = i64::try_from(value);
                whole
                    .map(Whole)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
            }

            #[expect(
                clippy::cast_possible_truncation,
                reason = "bounds and fraction are checked first"
            )]
            fn visit_f64<E: Error>(self, value: f64) -> Result<Whole, E> {
                if value.fract() == 0.0 && value.abs() <= FLOAT_EXACT_MAX {
                    Ok(Whole(value as i64))
                } else {
                    Err(E::invalid_value(de::Unexpected::Float(value), &self))
                }
            }
        }

        deserializer.deserialize_any(WholeVisitor)
    }
}

/// An integer that may not be negative.
#[derive(Clone, Copy, Debug)]
pub(super) struct Natural(u64);

impl<'de> Deserialize<'de> for Natural {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Whole(value) = Whole::deserialize(deserializer)?;
        u64::try_from(value).map(Self).map_err(|_| {
            D::Error::invalid_value(de::Unexpected::Signed(value), &"an integer of 0 or more")
        })
    }
}

impl From<Whole> for Option<i64> {
    fn from(Whole(value): Whole) -> Self {
        Some(value)
    }
}

impl From<Natural> for Option<u64> {
    fn from(Natural(value): Natural) -> Self {
        Some(value)
    }
}

/// A parameter value: text, or anything else as its JSON text, so that `{"limit":5}` means `{"limit":"5"}`.
#[derive(Debug)]
pub(super) struct ParamText(pub(super) String);

impl<'de> Deserialize<'de> for ParamText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => text,
            other => other.to_string(),
        }))
    }
}
