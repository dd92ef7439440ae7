//! Checks of the source tree itself: who may import whom, and how long a file may grow.
//!
//! `ROOMS` is the architecture in one table. A room imports only what its row names, and the rows
//! may only name rows above them, so an import cycle cannot be written down.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

struct Room {
    name: &'static str,
    /// A pure room has no clock, no task, no socket, no file and no randomness.
    pure: bool,
    imports: &'static [&'static str],
}

const fn pure(name: &'static str, imports: &'static [&'static str]) -> Room {
    Room {
        name,
        pure: true,
        imports,
    }
}

const fn room(name: &'static str, imports: &'static [&'static str]) -> Room {
    Room {
        name,
        pure: false,
        imports,
    }
}

#[rustfmt::skip]
const ROOMS: &[Room] = &[
    pure("stdx",      &[]),
    pure("types",     &["stdx"]),
    pure("wire",      &["types", "stdx"]),
    pure("placement", &["types", "stdx"]),
    pure("auth",      &["types", "stdx"]),
    pure("channel",   &["wire", "types", "stdx"]),
    pure("session",   &["auth", "wire", "types", "stdx"]),
    room("tasks",     &["stdx"]),
    room("telemetry", &["stdx"]),
    room("storage",   &["tasks", "wire", "types", "stdx"]),
    room("archive",   &["channel", "wire", "types", "stdx"]),
    room("transport", &["tasks", "wire", "types", "stdx"]),
    room("raft",      &["storage", "transport", "tasks", "channel", "wire", "types", "stdx"]),
    // The registry holds what tokens are revoked: the set with its bounds and its expiry is auth's.
    room("cluster",   &["raft", "transport", "tasks", "placement", "channel", "auth", "wire", "types", "stdx"]),
    room("broker",    &["cluster", "tasks", "channel", "wire", "types", "stdx"]),
    room("gateway",   &["broker", "tasks", "session", "auth", "wire", "types", "stdx"]),
    room("bridge",    &["broker", "tasks", "wire", "types", "stdx"]),
    // The command-line client speaks the public protocol only, so it may see nothing of the broker.
    room("client",    &["tasks", "wire", "types", "stdx"]),
    room("admin",     &["bridge", "broker", "cluster", "tasks", "auth", "wire", "types", "stdx"]),
    // config also fills in what pure rooms take: limits of `session`, capabilities of `auth`, the birth in `wire`.
    room("config",    &["admin", "archive", "bridge", "gateway", "broker", "cluster", "raft", "transport", "storage",
                        "telemetry", "session", "auth", "wire", "types", "stdx"]),
    room("node",      &["config", "admin", "archive", "bridge", "gateway", "broker", "cluster", "raft", "transport", "storage",
                        "placement", "channel", "wire", "auth", "telemetry", "tasks", "types", "stdx"]),
];

const FILE_LINES_MAX: usize = 800;
const PURE_BANS: &[&str] = &[
    "tokio::",
    "std::net",
    "std::fs",
    "std::thread",
    "rand::",
    "Instant::now",
    "SystemTime::now",
];

#[test]
fn rooms_only_name_rooms_above_them() {
    let mut above = BTreeSet::new();
    for room in ROOMS {
        for import in room.imports {
            assert!(
                above.contains(import),
                "`{}` names `{import}`, which is not above it",
                room.name
            );
            let theirs = ROOMS.iter().find(|r| r.name == *import).unwrap();
            assert!(
                !room.pure || theirs.pure,
                "pure `{}` names impure `{import}`",
                room.name
            );
        }
        above.insert(room.name);
    }
}

#[test]
fn source_files_are_tidy() {
    let mut paths = Vec::new();
    rust_files(Path::new("src"), &mut paths);
    let complaints: Vec<String> = paths.iter().flat_map(|path| complaints(path)).collect();
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

fn complaints(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let mut found = Vec::new();
    let mut say =
        |line: usize, what: String| found.push(format!("{}:{line}: {what}", path.display()));

    if code.lines().count() > FILE_LINES_MAX {
        say(
            1,
            format!("more than {FILE_LINES_MAX} lines before the tests; split it"),
        );
    }
    if !text.starts_with("//!") {
        say(
            1,
            "first line must be `//!` and say what the file is for".into(),
        );
    }
    let name = room_name(path);
    if ["lib", "main", "bin"].contains(&name.as_str()) {
        return found;
    }
    let Some(room) = ROOMS.iter().find(|r| r.name == name) else {
        say(1, format!("`{name}` has no row in ROOMS"));
        return found;
    };
    for (line, import) in imports(code) {
        let known = ROOMS.iter().any(|r| r.name == import);
        if known && import != name && !room.imports.contains(&import.as_str()) {
            say(line, format!("`{name}` may not import `{import}`"));
        }
    }
    for (index, line) in code
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim_start().starts_with("//"))
    {
        if line.contains("super::super") {
            say(
                index + 1,
                "write `crate::room::..` instead of `super::super`".into(),
            );
        }
        if room.name != "tasks" && line.contains("tokio::spawn(") {
            say(index + 1, "start tasks through `tasks::Tasks`".into());
        }
        if let Some(ban) = PURE_BANS
            .iter()
            .find(|ban| room.pure && line.contains(**ban))
        {
            say(index + 1, format!("pure room `{name}` names `{ban}`"));
        }
    }
    found
}

/// Rooms named by `crate::room` or by the first level of `crate::{room::.., other}`.
fn imports(code: &str) -> Vec<(usize, String)> {
    let ident = |s: &str| -> String {
        s.trim_start()
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let line = code[..at].matches('\n').count() + 1;
        let rest = &code[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push((line, ident(rest)));
            continue;
        };
        let (mut depth, mut start) = (1, 0);
        for (i, c) in group.char_indices() {
            depth += i32::from(c == '{') - i32::from(c == '}');
            if depth == 0 || (depth == 1 && c == ',') {
                found.push((line, ident(&group[start..i])));
                start = i + 1;
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

fn room_name(path: &Path) -> String {
    let first = path.strip_prefix("src").unwrap().iter().next().unwrap();
    Path::new(first)
        .file_stem()
        .unwrap()
        .to_string_lossy()
        .into_owned()
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}
