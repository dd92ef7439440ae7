//! TLS and QUIC settings: only nodes of this cluster get in, and a dead one is noticed in time.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::WebPkiClientVerifier;

use crate::transport::certs::{self, Identity};
use crate::transport::{Error, Lane, Options};
use crate::types::NodeId;

/// Names the protocol in the TLS handshake; the number is raised when the framing changes.
const ALPN: &[u8] = b"firth/1";

/// Largest datagram, where the network takes it: every packet has its price, whatever its size. quinn hands ten at a time to
/// the kernel, which takes at most 65,507 bytes and drops what is more.
const DATAGRAM_BYTES_MAX: u16 = 6_500;

/// Round trips before the first measurement are taken to be this long (quinn: 333 ms), so that a lost first
/// packet of a dial is sent again in time for the dial to succeed.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// Settings for dialing, one per lane.
#[derive(Clone, Debug)]
pub(super) struct ClientConfigs {
    raft: quinn::ClientConfig,
    bulk: quinn::ClientConfig,
}

impl ClientConfigs {
    pub(super) fn lane(&self, lane: Lane) -> quinn::ClientConfig {
        match lane {
            Lane::Raft => self.raft.clone(),
            Lane::Bulk => self.bulk.clone(),
        }
    }
}

pub(super) fn client_configs(
    options: &Options,
    identity: &Identity,
) -> Result<ClientConfigs, Error> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed session would skip the peer's certificate, which the server side needs to see each time.
    tls.resumption = rustls::client::Resumption::disabled();
    let crypto = QuicClientConfig::try_from(tls).map_err(Error::quic)?;
    let crypto = Arc::new(crypto);
    let lane = |idle| -> Result<_, Error> {
        let mut transport = transport_config(options, idle)?;
        // Only the dialing side asks; its questions and their answers keep both sides awake.
        transport.keep_alive_interval(Some(options.keep_alive));
        let mut config = quinn::ClientConfig::new(crypto.clone());
        config.transport_config(Arc::new(transport));
        Ok(config)
    };
    Ok(ClientConfigs {
        raft: lane(options.raft_idle_timeout)?,
        bulk: lane(options.bulk_idle_timeout)?,
    })
}

pub(super) fn server_config(
    options: &Options,
    identity: &Identity,
) -> Result<quinn::ServerConfig, Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(identity)?.into(), provider())
        .build()
        .map_err(Error::quic)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.send_tls13_tickets = 0;
    let crypto = QuicServerConfig::try_from(tls).map_err(Error::quic)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    // QUIC takes the smaller of both sides' limits, so the dialer's lane decides.
    let idle = options.raft_idle_timeout.max(options.bulk_idle_timeout);
    config.transport_config(Arc::new(transport_config(options, idle)?));
    config.migration(false);
    Ok(config)
}

/// A node that comes back on its port must be able to tell others at once that their old connections are dead
/// (a stateless reset). Both keys below therefore come from its certificate's key and survive a restart.
pub(super) fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let derive = |label: &[u8]| {
        let secret = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, identity.key.secret_der());
        ring::hmac::sign(&secret, label)
    };
    let reset = derive(b"firth quic stateless reset");
    let cid = derive(b"firth quic connection ids");
    let mut seed = [0; 8];
    seed.copy_from_slice(&cid.as_ref()[..8]);
    let seed = u64::from_le_bytes(seed);
    let reset_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, reset.as_ref());
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(seed)));
    (config.max_udp_payload_size(DATAGRAM_BYTES_MAX)).expect("the constant is in bounds");
    config
}

/// Whether `certificate` was made for `node` of the cluster.
pub(super) fn is_certificate_of(
    certificate: &CertificateDer<'_>,
    cluster_id: &str,
    node: NodeId,
) -> bool {
    let Ok(name) = ServerName::try_from(certs::node_name(cluster_id, node)) else {
        return false;
    };
    webpki::EndEntityCert::try_from(certificate)
        .is_ok_and(|cert| cert.verify_is_valid_for_subject_name(&name).is_ok())
}

fn transport_config(options: &Options, idle: Duration) -> Result<quinn::TransportConfig, Error> {
    let mut config = quinn::TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(DATAGRAM_BYTES_MAX);
    let window = |bytes: u32| VarInt::from_u32(bytes);
    config
        .max_idle_timeout(Some(IdleTimeout::try_from(idle).map_err(Error::quic)?))
        .initial_rtt(INITIAL_RTT)
        .max_concurrent_bidi_streams(VarInt::from_u32(options.streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(discovery))
        // A small send window lets one bulk stream stop every other stream of the connection.
        .send_window(u64::from(options.window_bytes))
        .receive_window(window(options.window_bytes))
        .stream_receive_window(window(options.stream_window_bytes));
    Ok(config)
}

fn roots(identity: &Identity) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in &identity.ca {
        roots.add(certificate.clone())?;
    }
    Ok(roots)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
