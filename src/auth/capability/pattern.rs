//! Resources of a capability: which names they cover, and what two of them cover in common.

/// A resource of a capability.
///
/// Segments are split by `:`. `*` stands for one whole segment, as the last one for one or more; anywhere
/// else it is a plain character. A qualifier such as `[meta]` or `[queue]` keeps a resource from ordinary channels; `[*]` is
/// any qualifier or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    text: String,
    qualifier: Qualifier,
    segments: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Qualifier {
    /// Ordinary channels only.
    None,
    /// Any, or none.
    Any,
    This(String),
    /// It is never closed, or one of two: the resource covers nothing.
    Broken,
}

impl Pattern {
    pub(super) fn parse(resource: &str) -> Self {
        let (qualifier, path) = match resource.strip_prefix('[') {
            None => (Qualifier::None, resource),
            Some(rest) => match rest.split_once(']') {
                // Two qualifiers: without the first it would turn into another resource.
                Some((_, path)) if path.starts_with('[') => (Qualifier::Broken, path),
                Some(("*", path)) => (Qualifier::Any, path),
                Some((name, path)) => (Qualifier::This(name.to_owned()), path),
                None => (Qualifier::Broken, resource),
            },
        };
        Self {
            text: resource.to_owned(),
            qualifier,
            segments: path.split(':').map(str::to_owned).collect(),
        }
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn is_every_channel(&self) -> bool {
        self.covers(None) && self.segments == ["*"]
    }

    fn covers(&self, qualifier: Option<&str>) -> bool {
        match (&self.qualifier, qualifier) {
            (Qualifier::Any, _) | (Qualifier::None, None) => true,
            (Qualifier::This(ours), Some(theirs)) => ours == theirs,
            (Qualifier::None | Qualifier::This(_) | Qualifier::Broken, _) => false,
        }
    }

    /// One pass over both: a `*` stands for exactly one segment, except the last, so nothing needs retrying.
    pub(super) fn matches(&self, qualifier: Option<&str>, name: &str) -> bool {
        if !self.covers(qualifier) {
            return false;
        }
        let mut names = name.split(':');
        for (place, segment) in self.segments.iter().enumerate() {
            let Some(name) = names.next() else {
                return false;
            };
            if segment == "*" {
                if place + 1 == self.segments.len() {
                    return true;
                }
            } else if segment != name {
                return false;
            }
        }
        names.next().is_none()
    }

    /// The resource that covers exactly what both cover; `None` where that is nothing.
    ///
    /// There always is one: where both say which segment, they must agree, where one does, it does for both, and a last
    /// `*` takes whatever the longer one still asks for.
    pub(super) fn meet(&self, other: &Self) -> Option<Self> {
        let qualifier = match (&self.qualifier, &other.qualifier) {
            (Qualifier::Broken, _) | (_, Qualifier::Broken) => return None,
            (Qualifier::Any, one) | (one, Qualifier::Any) => one,
            (ours, theirs) if ours == theirs => ours,
            _ => return None,
        };
        let (long, short) = if self.segments.len() >= other.segments.len() {
            (&self.segments, &other.segments)
        } else {
            (&other.segments, &self.segments)
        };
        let open = short.last().is_some_and(|last| last == "*");
        if long.len() > short.len() && !open {
            return None;
        }
        let theirs = short
            .iter()
            .chain(std::iter::repeat(&short[short.len() - 1]));
        let met = long.iter().zip(theirs).map(|(a, b)| match (&**a, &**b) {
            ("*", one) | (one, "*") => Some(one),
            (one, other) => (one == other).then_some(one),
        });
        let segments: Vec<&str> = met.collect::<Option<_>>()?;
        let path = segments.join(":");
        let text = match qualifier {
            Qualifier::None | Qualifier::Broken => path,
            Qualifier::Any => format!("[*]{path}"),
            Qualifier::This(name) => format!("[{name}]{path}"),
        };
        Some(Self::parse(&text))
    }
}
