//! The payload of a message or of a presence event: its data and the encoding steps still applied to it.

use std::borrow::Cow;
use std::fmt;

use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::engine::{DecodePaddingMode, Engine};
use bytes::Bytes;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

/// The last encoding step of binary data in JSON.
const BASE64: &str = "base64";

/// Standard alphabet; written with padding, read with or without.
const BASE64_CODEC: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A message's payload as it is between the formats: the same whichever format it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    Text(String),
    Binary(Bytes),
}

impl Data {
    /// Bytes of the payload itself, without what a format adds.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
        }
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Brings what a format allows into the one form kept inside: data and its encoding.
pub(super) fn normalise(
    written: Option<WireData>,
    mut encoding: Option<String>,
) -> (Option<Data>, Option<String>) {
    let mut data = written.map(|data| match data {
        WireData::Plain(data) => data,
        WireData::Json(text) => {
            let steps = encoding.take().unwrap_or_default();
            encoding = Some(match strip_step(&steps, "json") {
                Some(_) => steps,
                None => with_step(&steps, "json"),
            });
            Data::Text(text)
        }
    });
    while let (Some(coded), Some(steps)) = (&data, &encoding) {
        let Some(rest) = strip_step(steps, BASE64) else {
            break;
        };
        let text = match coded {
            Data::Text(text) => text.as_bytes(),
            Data::Binary(bytes) => bytes,
        };
        let Ok(bytes) = BASE64_CODEC.decode(text) else {
            break;
        };
        let rest = (!rest.is_empty()).then(|| rest.to_owned());
        data = Some(Data::Binary(bytes.into()));
        encoding = rest;
    }
    (data, encoding.filter(|steps| !steps.is_empty()))
}

/// Data and encoding as a format has them: a human-readable one is JSON here, where binary data is base64 text.
pub(super) fn written<'a>(
    data: Option<&'a Data>,
    encoding: Option<&'a str>,
    human_readable: bool,
) -> (Option<DataToWrite<'a>>, Option<Cow<'a, str>>) {
    match data {
        Some(Data::Binary(bytes)) if human_readable => {
            let steps = with_step(encoding.unwrap_or_default(), BASE64);
            let text = DataToWrite::Text(Cow::Owned(BASE64_CODEC.encode(bytes)));
            (Some(text), Some(Cow::Owned(steps)))
        }
        Some(Data::Binary(bytes)) => {
            let bytes = DataToWrite::Binary(bytes);
            (Some(bytes), encoding.map(Cow::Borrowed))
        }
        Some(Data::Text(text)) => {
            let text = DataToWrite::Text(Cow::Borrowed(text));
            (Some(text), encoding.map(Cow::Borrowed))
        }
        None => (None, encoding.map(Cow::Borrowed)),
    }
}

/// Whether the encoding promises base64 that the data is not: decoding would have taken the step away.
pub(super) fn has_invalid_base64(data: Option<&Data>, encoding: Option<&str>) -> bool {
    data.is_some() && encoding.is_some_and(|steps| strip_step(steps, BASE64).is_some())
}

/// Bytes that count against limits (TM6): texts, data, and extras as JSON.
pub(super) fn size(
    texts: [&Option<String>; 2],
    data: Option<&Data>,
    extras: Option<&Map<String, Value>>,
) -> usize {
    let texts = texts
        .iter()
        .map(|text| text.as_ref().map_or(0, String::len));
    texts.sum::<usize>() + data.map_or(0, Data::len) + extras.map_or(0, |e| json_text(e).len())
}

fn json_text(extras: &Map<String, Value>) -> String {
    serde_json::to_string(extras).expect("a JSON object has text keys, so it has a text")
}

/// What precedes the last step of an encoding, if that is `step`.
fn strip_step<'a>(encoding: &'a str, step: &str) -> Option<&'a str> {
    let rest = encoding.strip_suffix(step)?;
    if rest.is_empty() {
        Some(rest)
    } else {
        rest.strip_suffix('/')
    }
}

fn with_step(encoding: &str, step: &str) -> String {
    if encoding.is_empty() {
        step.to_owned()
    } else {
        format!("{encoding}/{step}")
    }
}

/// Data as a decoder meets it. `Json` is the text of a value that should have been text or binary.
#[derive(Debug)]
pub(super) enum WireData {
    Plain(Data),
    Json(String),
}

impl<'de> Deserialize<'de> for WireData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DataVisitor;

        impl<'de> Visitor<'de> for DataVisitor {
            type Value = WireData;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text, binary or a JSON value")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<WireData, E> {
                self.visit_string(text.to_owned())
            }

            fn visit_string<E: Error>(self, text: String) -> Result<WireData, E> {
                Ok(WireData::Plain(Data::Text(text)))
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<WireData, E> {
                Ok(WireData::Plain(Data::Binary(Bytes::copy_from_slice(bytes))))
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<WireData, E> {
                Ok(WireData::Json(value.to_string()))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<WireData, E> {
                Ok(WireData::Json(value.to_string()))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<WireData, E> {
                Ok(WireData::Json(value.to_string()))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<WireData, E> {
                Ok(WireData::Json(Value::from(value).to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<WireData, A::Error> {
                let value = Value::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(WireData::Json(value.to_string()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<WireData, A::Error> {
                let value = Value::deserialize(MapAccessDeserializer::new(map))?;
                Ok(WireData::Json(value.to_string()))
            }
        }

        deserializer.deserialize_any(DataVisitor)
    }
}

/// Data as a format has it.
pub(super) enum DataToWrite<'a> {
    Text(Cow<'a, str>),
    Binary(&'a [u8]),
}

impl Serialize for DataToWrite<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Binary(bytes) => serializer.serialize_bytes(bytes),
        }
    }
}
