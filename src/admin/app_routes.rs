//! What the admin listener does with apps.

use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::admin::apps::{self, App};
use crate::admin::{Answer, Known, answer, refuse};
use crate::cluster::{AppError, CommandError};
use crate::types::AppId;

/// Creates an app; the answer is the only one with its secrets. With `?replace=true`, whatever was there with its id is gone.
pub(super) async fn create(
    State(known): State<Known>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let serving = match known.serving() {
        Ok(serving) => serving,
        Err(answer) => return answer,
    };
    let replace = match query.as_deref() {
        None | Some("" | "replace=false") => false,
        Some("replace=true") => true,
        Some(_) => {
            let what = "the query may say `replace=true` only";
            return refuse(StatusCode::BAD_REQUEST, what);
        }
    };
    // A page in an operator's browser cannot send this type here without asking first, and is not answered then.
    let kind = headers.get(header::CONTENT_TYPE);
    if kind.is_none_or(|kind| !kind.as_bytes().starts_with(b"application/json")) {
        return refuse(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "Content-Type is not application/json",
        );
    }
    let app = match apps::read(&body, random_text) {
        Ok(app) => app,
        Err(err) => return refuse(StatusCode::BAD_REQUEST, &err.to_string()),
    };
    let shown = App::of(&app, true);
    match serving.broker.cluster().put_app(app, replace).await {
        Ok(()) => answer(StatusCode::CREATED, &shown),
        Err(err) => refused(&err),
    }
}

pub(super) async fn list(State(known): State<Known>) -> Answer {
    let serving = match known.serving() {
        Ok(serving) => serving,
        Err(answer) => return answer,
    };
    let apps = serving.broker.registry().borrow().apps.clone();
    let apps: Vec<App> = apps.values().map(|app| App::of(app, false)).collect();
    answer(StatusCode::OK, &apps)
}

pub(super) async fn show(State(known): State<Known>, Path(id): Path<String>) -> Answer {
    let serving = match known.serving() {
        Ok(serving) => serving,
        Err(answer) => return answer,
    };
    let id: AppId = match id.parse() {
        Ok(id) => id,
        Err(err) => return refused(&AppError::Id(err)),
    };
    let app = serving.broker.registry().borrow().apps.get(&id).cloned();
    match app {
        Some(app) => answer(StatusCode::OK, &App::of(&app, false)),
        None => refused(&AppError::Unknown(id)),
    }
}

pub(super) async fn delete(State(known): State<Known>, Path(id): Path<String>) -> Answer {
    let serving = match known.serving() {
        Ok(serving) => serving,
        Err(answer) => return answer,
    };
    let id: AppId = match id.parse() {
        Ok(id) => id,
        Err(err) => return refused(&AppError::Id(err)),
    };
    match serving.broker.cluster().delete_app(&id).await {
        Ok(()) => answer::<Value>(StatusCode::OK, &json!({ "deleted": id.as_str() })),
        Err(err) => refused(&err),
    }
}

fn refused(err: &AppError) -> Answer {
    let status = match err {
        AppError::Id(_) => StatusCode::BAD_REQUEST,
        AppError::Unknown(_) => StatusCode::NOT_FOUND,
        AppError::Exists(_) | AppError::Command(CommandError::Refused(_)) => StatusCode::CONFLICT,
        AppError::Command(CommandError::Indeterminate) => StatusCode::SERVICE_UNAVAILABLE,
    };
    refuse(status, &err.to_string())
}

/// That many random bytes as letters, digits, `-` and `_`; begins with neither of the last two, which a command line would
/// take for an option.
fn random_text(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    loop {
        getrandom::fill(&mut random).expect("the system has randomness once it has booted");
        let text = URL_SAFE_NO_PAD.encode(&random);
        if text.starts_with(|first: char| first.is_ascii_alphanumeric()) {
            return text;
        }
    }
}
