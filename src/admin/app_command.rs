//! `firth admin app`.

use std::io::Read as _;
use std::path::PathBuf;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::admin::apps::App;
use crate::admin::call;
use crate::types::AppId;

/// Apps: tenants, each with its own keys, rules and channels
#[derive(Debug, clap::Subcommand)]
pub enum AppCommand {
    /// Create an app and show its keys, this once with their secrets.
    ///
    /// Without a file it has one key that may do everything. A file is one JSON object, of which everything may be left out:
    /// {"id": "..", "keys": [{"id": "..", "secret": "..", "capability": {"resource": ["operation"]}, "revocable_tokens": false}],
    /// "namespaces": [{"id": "..", "retention_ms": 0, "retention_bytes": 0, "last_only": false, "ephemeral": false}]}
    #[command(verbatim_doc_comment)]
    Create {
        /// The app's id: 1 to 32 letters, digits, `-` or `_`; made up when neither this nor the file says one
        id: Option<AppId>,
        /// What it has, JSON; `-` for standard input
        #[arg(short, long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// Replace the app with this id: what is not said of it now is gone, keys as well
        #[arg(long)]
        replace: bool,
        /// Output form
        #[arg(short, long, value_parser = ["table", "json"], default_value = "table")]
        output: String,
    },
    /// All apps
    List {
        /// Output form
        #[arg(short, long, value_parser = ["table", "json"], default_value = "table")]
        output: String,
    },
    /// One app with its keys and namespaces, without secrets
    Show {
        /// The app's id
        id: AppId,
        /// Output form
        #[arg(short, long, value_parser = ["table", "json"], default_value = "table")]
        output: String,
    },
    /// Delete an app: its keys and tokens open nothing any more.
    ///
    /// What its channels hold goes when its retention has passed; an app that is created with the same id before then has it.
    Delete {
        /// The app's id
        id: AppId,
    },
}

/// Carries out a command by the node whose admin listener is at `url`; `say` hears what comes of it.
///
/// # Errors
/// When the file cannot be read or is no such object, or the node refuses.
pub async fn run(
    url: &str,
    command: AppCommand,
    say: impl Fn(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let shown = |app: &App, output: &str| match output {
        "json" => Ok(serde_json::to_string_pretty(app)?),
        _ => anyhow::Ok(table(app)),
    };
    match command {
        AppCommand::Create {
            id,
            file,
            replace,
            output,
        } => {
            let request = request(id, file)?;
            let path = if replace {
                "/apps?replace=true"
            } else {
                "/apps"
            };
            let answer = call::send(url, path, &request).await?;
            say(&shown(&serde_json::from_str(&answer)?, &output)?)
        }
        AppCommand::List { output } => {
            let answer = call::get(url, "/apps").await?;
            let apps: Vec<App> = serde_json::from_str(&answer)?;
            match output.as_str() {
                "json" => say(&serde_json::to_string_pretty(&apps)?),
                _ => say(&list(&apps)),
            }
        }
        AppCommand::Show { id, output } => {
            let answer = call::get(url, &format!("/apps/{id}")).await?;
            say(&shown(&serde_json::from_str(&answer)?, &output)?)
        }
        AppCommand::Delete { id } => {
            call::delete(url, &format!("/apps/{id}")).await?;
            say(&format!("app {id} is deleted"))
        }
    }
}

/// The file's object with the id put in.
fn request(id: Option<AppId>, file: Option<PathBuf>) -> anyhow::Result<Value> {
    let Some(file) = file else {
        return Ok(id.map_or_else(|| json!({}), |id| json!({ "id": id.as_str() })));
    };
    let name = file.display();
    let text = if file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(&file)
    };
    let text = text.with_context(|| format!("cannot read {name}"))?;
    let read: serde_json::Result<Value> = serde_json::from_str(&text);
    let mut app = read.with_context(|| format!("{name} is not JSON"))?;
    let Some(fields) = app.as_object_mut() else {
        anyhow::bail!("{name} is not a JSON object");
    };
    if let Some(id) = id {
        let said = fields.insert("id".to_owned(), json!(id.as_str()));
        if said.is_some_and(|said| said != json!(id.as_str())) {
            anyhow::bail!("{name} describes another app than `{id}`");
        }
    }
    Ok(app)
}

fn list(apps: &[App]) -> String {
    let mut text = format!("{:<32}  {:>5}  NAMESPACES", "APP", "KEYS");
    for app in apps {
        let namespaces: Vec<&str> = app.namespaces.iter().map(|rule| &*rule.id).collect();
        text += &format!(
            "\n{:<32}  {:>5}  {}",
            app.id,
            app.keys.len(),
            namespaces.join(" ")
        );
    }
    text
}

fn table(app: &App) -> String {
    let mut text = format!("app {}", app.id);
    for key in &app.keys {
        let shown = key.key.as_ref().unwrap_or(&key.name);
        let revocable = if key.revocable_tokens {
            "  tokens revocable"
        } else {
            ""
        };
        text += &format!("\nkey {shown}  {}{revocable}", key.capability);
    }
    for rule in &app.namespaces {
        let mut says = vec![format!("retention {} ms", rule.retention_ms)];
        if rule.retention_bytes > 0 {
            says.push(format!("{} bytes a channel", rule.retention_bytes));
        }
        says.extend(rule.last_only.then(|| "last only".to_owned()));
        says.extend(rule.ephemeral.then(|| "ephemeral".to_owned()));
        text += &format!("\nnamespace {}  {}", rule.id, says.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.json");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    fn id(text: &str) -> Option<AppId> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn a_file_and_an_id_make_one_request() {
        assert_eq!(request(None, None).unwrap(), json!({}));
        assert_eq!(request(id("a"), None).unwrap(), json!({ "id": "a" }));
        let (_dir, path) = file(r#"{"keys":[]}"#);
        let both = json!({ "id": "a", "keys": [] });
        assert_eq!(request(id("a"), Some(path)).unwrap(), both);
        let (_dir, path) = file(r#"{"id":"a"}"#);
        assert_eq!(request(id("a"), Some(path)).unwrap(), json!({ "id": "a" }));
    }

    #[test]
    fn what_cannot_be_sent_is_refused_with_the_files_name() {
        for (text, reason) in [
            ("{", "is not JSON"),
            ("[]", "is not a JSON object"),
            (r#"{"id":"b"}"#, "another app"),
        ] {
            let (_dir, path) = file(text);
            let complaint = request(id("a"), Some(path)).unwrap_err();
            let complaint = format!("{complaint:#}");
            assert!(
                complaint.contains("app.json") && complaint.contains(reason),
                "{complaint}"
            );
        }
        let complaint = request(None, Some("/nonexistent/app.json".into())).unwrap_err();
        assert!(complaint.to_string().contains("/nonexistent/app.json"));
    }
}
