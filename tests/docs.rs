//! Checks of `docs/`: the page of errors is what the table in the code gives; the table of the protocol's features
//! names tests that exist. `FIRTH_WRITE_DOCS=1 cargo test --test docs` writes the page of errors anew.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use firth::types::{ErrorCode, Retry};

const ERRORS: &str = "docs/errors.md";
const PROTOCOL: &str = "docs/protocol.md";
const STATES: [&str; 3] = ["works", "partly", "not yet"];

fn errors_page() -> String {
    let mut page = "# Errors\n\nEvery error that a client can see, from the one closed table `types::ErrorCode`. This page is \
        generated from it; `tests/docs.rs` says how and checks that it is current.\n\n\
        | Code | HTTP status | Name | What happened | Repeat the request? |\n|---|---|---|---|---|\n"
        .to_owned();
    for error in ErrorCode::ALL {
        let again = match error.retry() {
            Retry::Never => "no",
            Retry::Later => "yes, later; nothing was stored",
            Retry::WithNewToken => "yes, with a new token",
            Retry::Unknown => "yes, with the same id; it may have taken effect",
        };
        let (code, status, text) = (error.code(), error.status(), error.text());
        writeln!(
            page,
            "| {code} | {status} | `{error:?}` | {text} | {again} |"
        )
        .unwrap();
    }
    page
}

#[test]
fn the_page_of_errors_is_current() {
    let page = errors_page();
    if std::env::var_os("FIRTH_WRITE_DOCS").is_some() {
        fs::write(ERRORS, &page).unwrap();
    }
    assert!(
        fs::read_to_string(ERRORS).unwrap() == page,
        "{ERRORS} is not what `types::ErrorCode` gives; FIRTH_WRITE_DOCS=1 writes it"
    );
}

/// Rows of the table of features: section, feature, state, tests.
fn features() -> Vec<Vec<String>> {
    let page = fs::read_to_string(PROTOCOL).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| §"));
    rows.map(|row| {
        let cells = row.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    })
    .collect()
}

#[test]
fn every_feature_has_a_state_and_tests_that_exist() {
    let rust = rust_tests();
    let mut complaints = Vec::new();
    let features = features();
    assert!(features.len() > 50, "only {} features", features.len());
    for row in &features {
        let [_, feature, state, shown, _] = &row[..] else {
            complaints.push(format!("{row:?}: not five cells"));
            continue;
        };
        if !STATES.contains(&state.as_str()) {
            complaints.push(format!("{feature}: `{state}` is no state"));
        }
        let named: Vec<&str> = shown.split('`').skip(1).step_by(2).collect();
        if named.is_empty() && state == "works" {
            complaints.push(format!("{feature}: no test shows that it works"));
        }
        for test in named {
            let exists = if test.ends_with(".mjs") {
                Path::new("tests/sdk").join(test).exists()
            } else {
                rust.contains(test)
            };
            if !exists {
                complaints.push(format!("{feature}: there is no test `{test}`"));
            }
        }
    }
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// Names of the functions under `src` and `tests` that have a test's attribute, and of those in `proptest!`.
fn rust_tests() -> BTreeSet<String> {
    let mut paths = Vec::new();
    rust_files(Path::new("src"), &mut paths);
    rust_files(Path::new("tests"), &mut paths);
    let mut found = BTreeSet::new();
    for path in paths {
        let text = fs::read_to_string(&path).unwrap();
        let mut marked = false;
        for line in text.lines().map(str::trim) {
            if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                marked = true;
            } else if let Some(rest) = line.strip_prefix("fn ").or(line.strip_prefix("async fn "))
                && std::mem::take(&mut marked)
            {
                found.extend(rest.split('(').next().map(str::to_owned));
            }
        }
    }
    found
}

fn rust_files(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("node_modules") {
            continue;
        }
        if path.is_dir() {
            rust_files(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}
