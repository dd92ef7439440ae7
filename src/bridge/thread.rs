//! A named thread for librdkafka, whose calls and drops block: stopped by a token, awaited with a deadline.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// A running thread. Dropping it asks it to stop and does not wait.
#[derive(Debug)]
pub(super) struct Worker {
    stop: CancellationToken,
    /// Resolves when the thread has let go of everything.
    ended: oneshot::Receiver<()>,
}

impl Worker {
    /// Starts `work`, which must return soon after its token is cancelled.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn start(
        name: String,
        stop: CancellationToken,
        work: impl FnOnce(CancellationToken) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (ended_tx, ended) = oneshot::channel();
        let token = stop.clone();
        std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| work(token))).is_err() {
                    error!(thread = name, "thread panicked");
                }
                // The receiver is gone when nobody waits any more.
                let _ = ended_tx.send(());
            })?;
        Ok(Self { stop, ended })
    }

    /// Whether the thread ended by itself.
    pub(super) fn is_ended(&mut self) -> bool {
        !matches!(
            self.ended.try_recv(),
            Err(oneshot::error::TryRecvError::Empty)
        )
    }

    /// Resolves when the thread ends.
    pub(super) async fn ended(&mut self) {
        let _ = (&mut self.ended).await;
    }

    /// Asks the thread to stop.
    pub(super) fn ask(&self) {
        self.stop.cancel();
    }

    /// Asks the thread to stop and waits; `false` when it did not in time.
    pub(super) async fn stop(mut self, grace: Duration) -> bool {
        self.ask();
        if self.ended.is_terminated() {
            return true;
        }
        tokio::time::timeout(grace, &mut self.ended).await.is_ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
