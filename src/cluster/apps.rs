//! Apps in the registry: created, replaced and deleted while the cluster lives, and what tokens of their keys are revoked.
//!
//! An app that is deleted is gone from the registry at once, and with it every way in. What its channels hold is not looked
//! for: nobody can reach it, and it goes with its retention, as that was when each record was stored. An app that is
//! created with the same id before then finds it again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::auth::{KeyName, Revocation, Revocations, Target};
use crate::cluster::{Cluster, CommandError, Registry};
use crate::types::{AppId, ParseIdError};
use crate::wire::control;
use crate::wire::control::entry::Command;

/// Apps of one cluster. The registry is in the memory of every node, and copied for each change of it.
const APPS_MAX: usize = 10_000;

/// How long a change may take to show on the node that was asked for it.
const SHOW: Duration = Duration::from_secs(5);

/// Why an app was not created, replaced or deleted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppError {
    #[error("{0}")]
    Id(#[from] ParseIdError),
    #[error("there is no app `{0}`")]
    Unknown(AppId),
    #[error("there is an app `{0}` already")]
    Exists(AppId),
    #[error("{0}")]
    Command(#[from] CommandError),
}

impl Registry {
    pub(super) fn put_app(&mut self, change: control::PutApp) -> Result<(), String> {
        let app = change.app.ok_or("the command has no app")?;
        let id: AppId = app
            .id
            .parse()
            .map_err(|err: ParseIdError| err.to_string())?;
        match self.apps.get(&id) {
            // A command that was sent twice.
            Some(known) if **known == app => return Ok(()),
            Some(_) if change.if_absent => return Err(exists(&id)),
            Some(_) => {}
            None if self.apps.len() >= APPS_MAX => {
                return Err(format!("a cluster has {APPS_MAX} apps at most"));
            }
            None => {}
        }
        Arc::make_mut(&mut self.apps).insert(id, Arc::new(app));
        Ok(())
    }

    /// Revocations stay until they expire: an app of the same id and keys must not revive what was revoked.
    pub(super) fn delete_app(&mut self, change: &control::DeleteApp) -> Result<(), String> {
        let born = self.bootstrap.as_ref();
        let mut bridges = born.into_iter().flat_map(|born| &born.bridges);
        if let Some(bridge) = bridges.find(|bridge| bridge.app == change.id) {
            return Err(format!("the bridge `{}` mirrors this app", bridge.id));
        }
        let Ok(id) = change.id.parse::<AppId>() else {
            return Ok(());
        };
        if self.apps.contains_key(&id) {
            Arc::make_mut(&mut self.apps).remove(&id);
        }
        Ok(())
    }

    pub(super) fn revoke_tokens(&mut self, change: &control::RevokeTokens) -> Result<(), String> {
        let app: Option<AppId> = change.app.parse().ok();
        let app = app.and_then(|id| self.apps.get(&id));
        let key = app.and_then(|app| app.keys.iter().find(|key| key.id == change.key));
        match key {
            None => Err("there is no such key".to_owned()),
            Some(key) if !key.revocable_tokens => {
                Err("tokens of this key cannot be revoked".to_owned())
            }
            Some(_) => self.revoke(change),
        }
    }

    /// Adds to what is revoked, all of it or nothing.
    pub(super) fn revoke(&mut self, change: &control::RevokeTokens) -> Result<(), String> {
        let mut revocations = (*self.revocations).clone();
        revocations.expire(self.stamp_ms);
        add_revocations(&mut revocations, change, self.stamp_ms)?;
        self.revocations = Arc::new(revocations);
        Ok(())
    }
}

/// Adds them in place; some of them when one cannot be.
pub(super) fn add_revocations(
    revocations: &mut Revocations,
    change: &control::RevokeTokens,
    stamp_ms: u64,
) -> Result<(), String> {
    let name = format!("{}.{}", change.app, change.key);
    let key = KeyName::parse(&name).ok_or("there is no such key")?;
    for target in &change.targets {
        let revocation = Revocation {
            key: key.clone(),
            target: Target::parse(target).map_err(|err| err.message)?,
            issued_before_ms: change.issued_before_ms,
            applies_at_ms: change.applies_at_ms,
        };
        let added = revocations.add(revocation, stamp_ms);
        added.map_err(|err| err.to_string())?;
    }
    Ok(())
}

fn exists(id: &AppId) -> String {
    format!("there is an app `{id}` already")
}

/// What revokes this again.
pub(super) fn revoke_command(revocation: Revocation) -> control::RevokeTokens {
    control::RevokeTokens {
        app: revocation.key.app.to_string(),
        key: revocation.key.key_id,
        targets: vec![revocation.target.to_string()],
        issued_before_ms: revocation.issued_before_ms,
        applies_at_ms: revocation.applies_at_ms,
    }
}

/// Apps with an id that cannot be are left out; configurations with such are refused.
pub(super) fn by_id(apps: &[control::App]) -> Arc<BTreeMap<AppId, Arc<control::App>>> {
    let known = apps.iter();
    let known = known.filter_map(|app| Some((app.id.parse().ok()?, Arc::new(app.clone()))));
    Arc::new(known.collect())
}

impl Cluster {
    /// Creates an app; with `replace`, whatever was there with its id is gone. Returns when this node knows it; the others do
    /// with their next word from the control group's leader.
    ///
    /// # Errors
    /// `Exists` when there is another with its id and `replace` is not said; nothing has changed unless it says that it may
    /// have.
    pub async fn put_app(&self, app: control::App, replace: bool) -> Result<(), AppError> {
        let id: AppId = app.id.parse()?;
        let command = Command::PutApp(control::PutApp {
            app: Some(app.clone()),
            if_absent: !replace,
        });
        match self.command(command).await {
            Err(CommandError::Refused(why)) if why == exists(&id) => {
                return Err(AppError::Exists(id));
            }
            done => done?,
        }
        let shown = |registry: &Registry| registry.apps.get(&id).is_some_and(|now| **now == app);
        self.shown(shown).await
    }

    /// Deletes an app: its keys and tokens open nothing any more. Returns when this node knows it; the others do with their
    /// next word from the control group's leader.
    ///
    /// # Errors
    /// `Unknown` when this node knows no such app; when a bridge mirrors it, or the control group is not reached.
    pub async fn delete_app(&self, id: &AppId) -> Result<(), AppError> {
        if !self.registry().borrow().apps.contains_key(id) {
            return Err(AppError::Unknown(id.clone()));
        }
        let command = Command::DeleteApp(control::DeleteApp { id: id.to_string() });
        self.command(command).await?;
        self.shown(|registry| !registry.apps.contains_key(id)).await
    }

    async fn shown(&self, shown: impl Fn(&Registry) -> bool) -> Result<(), AppError> {
        let mut registry = self.registry();
        let seen = registry.wait_for(|registry| shown(registry));
        match tokio::time::timeout(SHOW, seen).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(CommandError::Indeterminate.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_795_309_503_139;

    fn app(id: &str, secret: &str) -> control::App {
        let key = control::Key {
            id: "key".into(),
            secret: secret.into(),
            capability: r#"{"*":["*"]}"#.into(),
            revocable_tokens: true,
        };
        control::App {
            id: id.into(),
            keys: vec![key],
            namespaces: vec![control::Namespace::default()],
        }
    }

    fn born() -> Registry {
        let bridge = control::Bridge {
            id: "kafka".into(),
            app: "first".into(),
            ..Default::default()
        };
        let bootstrap = control::Bootstrap {
            secret: "hidden-of-the-cluster".into(),
            apps: vec![app("first", "hidden-1"), app("second", "hidden-2")],
            bridges: vec![bridge],
            ..Default::default()
        };
        let mut registry = Registry::default();
        apply(&mut registry, NOW, Command::Bootstrap(bootstrap)).unwrap();
        registry
    }

    fn apply(registry: &mut Registry, stamp_ms: u64, command: Command) -> Result<(), String> {
        registry.apply(control::Entry {
            version: control::VERSION,
            stamp_ms,
            command: Some(command),
        })
    }

    fn put(registry: &mut Registry, app: control::App, if_absent: bool) -> Result<(), String> {
        let app = Some(app);
        apply(
            registry,
            NOW,
            Command::PutApp(control::PutApp { app, if_absent }),
        )
    }

    fn delete(registry: &mut Registry, id: &str) -> Result<(), String> {
        let id = id.to_owned();
        apply(registry, NOW, Command::DeleteApp(control::DeleteApp { id }))
    }

    fn revoke(key: &str, targets: &[&str]) -> Command {
        Command::RevokeTokens(control::RevokeTokens {
            app: "first".into(),
            key: key.into(),
            targets: targets.iter().map(|target| (*target).to_owned()).collect(),
            issued_before_ms: NOW,
            applies_at_ms: NOW + 30_000,
        })
    }

    fn ids(registry: &Registry) -> Vec<&str> {
        registry.apps.keys().map(AppId::as_str).collect()
    }

    #[test]
    fn the_apps_of_the_birth_are_the_first_and_come_and_go_like_any() {
        let mut registry = born();
        assert_eq!(ids(&registry), ["first", "second"]);
        put(&mut registry, app("third", "s"), true).unwrap();
        delete(&mut registry, "second").unwrap();
        assert_eq!(ids(&registry), ["first", "third"]);
        delete(&mut registry, "second").unwrap();
        let refused = delete(&mut registry, "first").unwrap_err();
        assert!(refused.contains("kafka"), "{refused}");
        assert!(put(&mut registry, app("a.b", "s"), false).is_err());
    }

    #[test]
    fn another_app_is_replaced_only_when_that_is_meant() {
        let mut registry = born();
        put(&mut registry, app("second", "hidden-2"), true).unwrap();
        assert!(put(&mut registry, app("second", "other"), true).is_err());
        let before = registry.apps.clone();
        put(&mut registry, app("second", "other"), false).unwrap();
        let second: AppId = "second".parse().unwrap();
        assert_eq!(registry.apps[&second].keys[0].secret, "other");
        assert_eq!(
            before[&second].keys[0].secret, "hidden-2",
            "who looked meanwhile"
        );
        let first: AppId = "first".parse().unwrap();
        assert!(Arc::ptr_eq(&before[&first], &registry.apps[&first]));
    }

    #[test]
    fn there_are_so_many_apps_and_no_more() {
        let mut registry = born();
        let apps = (0..APPS_MAX).map(|n| control::App {
            id: format!("app{n}"),
            ..Default::default()
        });
        registry.apps = by_id(&apps.collect::<Vec<_>>());
        assert!(put(&mut registry, app("one-more", "s"), false).is_err());
        put(&mut registry, app("app0", "s"), false).unwrap();
    }

    #[test]
    fn revocations_are_kept_whole_and_until_their_tokens_are_over() {
        let mut registry = born();
        apply(
            &mut registry,
            NOW,
            revoke("key", &["clientId:me", "channel:a:*"]),
        )
        .unwrap();
        assert_eq!(registry.revocations.iter().count(), 2);
        assert!(
            apply(
                &mut registry,
                NOW,
                revoke("key", &["clientId:you", "nonsense"])
            )
            .is_err()
        );
        assert!(apply(&mut registry, NOW, revoke("nokey", &["clientId:you"])).is_err());
        assert_eq!(registry.revocations.iter().count(), 2, "all or nothing");
        // A clock that went back does not bring time back.
        apply(&mut registry, NOW - 5, revoke("key", &["clientId:me"])).unwrap();
        assert_eq!(
            (registry.stamp_ms, registry.revocations.iter().count()),
            (NOW, 2)
        );
        apply(&mut registry, NOW + 3_600_000, revoke("key", &[])).unwrap();
        assert!(registry.revocations.is_empty());
        let mut plain = app("first", "s");
        plain.keys[0].revocable_tokens = false;
        put(&mut registry, plain, false).unwrap();
        assert!(apply(&mut registry, NOW, revoke("key", &["clientId:me"])).is_err());
    }

    #[test]
    fn a_snapshot_holds_apps_and_revocations() {
        let mut registry = born();
        put(&mut registry, app("third", "s"), true).unwrap();
        delete(&mut registry, "second").unwrap();
        apply(
            &mut registry,
            NOW,
            revoke("key", &["clientId:me", "revocationKey:x"]),
        )
        .unwrap();
        let copy = Registry::decode(registry.encode()).unwrap();
        assert_eq!(copy.apps, registry.apps);
        assert_eq!(copy.revocations, registry.revocations);
        assert_eq!(copy.stamp_ms, NOW);
        assert_eq!(
            copy.encode(),
            registry.encode(),
            "the same bytes for the same state"
        );
    }

    #[test]
    fn a_snapshot_from_before_has_the_apps_of_the_birth() {
        use prost::Message as _;
        let bootstrap = born().bootstrap.as_deref().cloned();
        let old = control::Snapshot {
            version: 1,
            bootstrap,
            ..Default::default()
        };
        let registry = Registry::decode(old.encode_to_vec().into()).unwrap();
        assert_eq!(ids(&registry), ["first", "second"]);
    }

    #[test]
    fn the_registry_shows_no_secrets() {
        let shown = format!("{:?}", born());
        assert!(
            shown.contains("second") && !shown.contains("hidden"),
            "{shown}"
        );
    }
}
