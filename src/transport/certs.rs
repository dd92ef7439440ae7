//! Certificates of a cluster: its own authority and one identity per node.
//!
//! Only certificates of this authority are trusted between nodes, never the machine's root store. A node proves
//! who it is by the name in its certificate: `node-<id>.<cluster id>.firth.internal`.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::types::NodeId;

/// File names within a directory of certificates.
const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const NODE_CERT: &str = "node.pem";
const NODE_KEY: &str = "node.key";

const DAY: Duration = Duration::from_hours(24);
const CA_DAYS: u32 = 20 * 365;
const NODE_DAYS: u32 = 5 * 365;
/// Clocks of machines differ; a certificate must be good on one that is a little behind.
const BACKDATED: Duration = Duration::from_hours(1);

/// Longest cluster id: with `node-<id>.` and the suffix it must still be a DNS name.
const CLUSTER_ID_BYTES_MAX: usize = 40;

/// Why certificates could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{} exists already; certificates are never overwritten", .0.display())]
    Exists(PathBuf),
    #[error("cannot access {}", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is not readable as PEM: {reason}", .path.display())]
    Pem { path: PathBuf, reason: String },
    #[error(
        "cluster id `{0}` is not 1 to {CLUSTER_ID_BYTES_MAX} lower-case letters, digits or inner `-`"
    )]
    ClusterId(String),
    #[error("cannot create the certificate: {0}")]
    Create(#[from] rcgen::Error),
}

/// What a node shows to others, and whom it believes.
#[derive(Debug)]
pub struct Identity {
    /// Roots that other nodes' certificates must lead to.
    pub ca: Vec<CertificateDer<'static>>,
    /// This node's certificate, then intermediates if there are any.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            ca: self.ca.clone(),
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

/// The DNS name that stands for a node in its certificate; it is never resolved.
#[must_use]
pub fn node_name(cluster_id: &str, node: NodeId) -> String {
    format!("node-{node}.{cluster_id}.firth.internal")
}

/// Makes the authority of a cluster: `ca.pem`, and `ca.key` (mode 0600), which nodes do not need.
///
/// # Errors
/// When a file of that name exists or the directory cannot be written.
pub fn create_ca(dir: &Path) -> Result<(), Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    let name = "firth cluster authority";
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_lifetime(&mut params, CA_DAYS);
    let key = KeyPair::generate()?;
    let cert = params.self_signed(&key)?;
    refuse_existing(dir, &[CA_CERT, CA_KEY])?;
    create_new(&dir.join(CA_KEY), &key.serialize_pem(), true)?;
    create_new(&dir.join(CA_CERT), &cert.pem(), false)
}

/// Makes one node's identity in `dir` (`node.pem`, `node.key` with mode 0600, a copy of `ca.pem`), signed by
/// the authority in `ca_dir`. `extra_names` are further DNS names or IP addresses to put in the certificate.
///
/// # Errors
/// When a file of that name exists, the authority cannot be read, or a name is not legal.
pub fn create_node(
    dir: &Path,
    ca_dir: &Path,
    cluster_id: &str,
    node: NodeId,
    extra_names: &[String],
) -> Result<(), Error> {
    check_cluster_id(cluster_id)?;
    let ca_pem = read(&ca_dir.join(CA_CERT))?;
    let issuer =
        Issuer::from_ca_cert_pem(&ca_pem, KeyPair::from_pem(&read(&ca_dir.join(CA_KEY))?)?)?;
    let mut names = vec![node_name(cluster_id, node)];
    names.extend_from_slice(extra_names);
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    let common = format!("firth node {node} of {cluster_id}");
    params.distinguished_name.push(DnType::CommonName, common);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Each node is client and server of the others.
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    set_lifetime(&mut params, NODE_DAYS);
    let key = KeyPair::generate()?;
    let cert = params.signed_by(&key, &issuer)?;
    refuse_existing(dir, &[NODE_CERT, NODE_KEY])?;
    create_new(&dir.join(NODE_KEY), &key.serialize_pem(), true)?;
    create_new(&dir.join(NODE_CERT), &cert.pem(), false)?;
    let ca_copy = dir.join(CA_CERT);
    match create_new(&ca_copy, &ca_pem, false) {
        // The node may live in the authority's own directory.
        Err(Error::Exists(_)) if read(&ca_copy)? == ca_pem => Ok(()),
        done => done,
    }
}

/// Reads what [`create_node`] wrote.
///
/// # Errors
/// When a file is missing or holds something else.
pub fn load(dir: &Path) -> Result<Identity, Error> {
    let key_path = dir.join(NODE_KEY);
    Ok(Identity {
        ca: load_certs(&dir.join(CA_CERT))?,
        chain: load_certs(&dir.join(NODE_CERT))?,
        key: PrivateKeyDer::from_pem_file(&key_path).map_err(|err| Error::Pem {
            path: key_path,
            reason: err.to_string(),
        })?,
    })
}

fn load_certs(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let broken = |reason: String| Error::Pem {
        path: path.to_owned(),
        reason,
    };
    let certs = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|err| broken(err.to_string()))?;
    if certs.is_empty() {
        return Err(broken("holds no certificate".to_owned()));
    }
    Ok(certs)
}

/// A cluster id becomes one label of a DNS name, so it may hold nothing else.
pub(super) fn check_cluster_id(id: &str) -> Result<(), Error> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let sized = (1..=CLUSTER_ID_BYTES_MAX).contains(&id.len());
    if sized && id.bytes().all(legal) && !id.starts_with('-') && !id.ends_with('-') {
        return Ok(());
    }
    Err(Error::ClusterId(id.chars().take(64).collect()))
}

fn set_lifetime(params: &mut CertificateParams, days: u32) {
    let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let start = rcgen::date_time_ymd(1970, 1, 1) + since_1970.saturating_sub(BACKDATED);
    params.not_before = start;
    params.not_after = start + DAY * days;
}

/// Looks before anything is written, so that a refused call leaves no half of a pair behind.
fn refuse_existing(dir: &Path, names: &[&str]) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(|source| Error::Io {
        path: dir.to_owned(),
        source,
    })?;
    match names.iter().map(|name| dir.join(name)).find(|p| p.exists()) {
        Some(path) => Err(Error::Exists(path)),
        None => Ok(()),
    }
}

fn create_new(path: &Path, text: &str, secret: bool) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(if secret { 0o600 } else { 0o644 });
    }
    let write = || {
        let mut file = options.open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| match source.kind() {
        std::io::ErrorKind::AlreadyExists => Error::Exists(path.to_owned()),
        _ => Error::Io {
            path: path.to_owned(),
            source,
        },
    })
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_round_trips_and_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, node) = (dir.path().join("ca"), dir.path().join("n1"));
        create_ca(&ca).unwrap();
        create_node(&node, &ca, "test", NodeId(1), &["127.0.0.1".to_owned()]).unwrap();
        let identity = load(&node).unwrap();
        assert_eq!((identity.ca.len(), identity.chain.len()), (1, 1));
        let before = fs::read(node.join(NODE_KEY)).unwrap();
        assert!(matches!(create_ca(&ca), Err(Error::Exists(_))));
        let again = create_node(&node, &ca, "test", NodeId(1), &[]);
        assert!(matches!(again, Err(Error::Exists(_))));
        assert_eq!(fs::read(node.join(NODE_KEY)).unwrap(), before);
    }

    #[cfg(unix)]
    #[test]
    fn keys_are_for_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        create_ca(dir.path()).unwrap();
        create_node(dir.path(), dir.path(), "test", NodeId(1), &[]).unwrap();
        for key in [CA_KEY, NODE_KEY] {
            let mode = fs::metadata(dir.path().join(key)).unwrap().permissions();
            assert_eq!(mode.mode() & 0o777, 0o600, "{key}");
        }
    }

    #[test]
    fn a_cluster_id_is_one_dns_label() {
        for good in ["a", "prod-eu-1"] {
            assert!(check_cluster_id(good).is_ok(), "{good}");
        }
        for bad in ["", "a.b", "A", "-a", "a-", "a b", &"x".repeat(41)] {
            assert!(check_cluster_id(bad).is_err(), "{bad}");
        }
    }
}
