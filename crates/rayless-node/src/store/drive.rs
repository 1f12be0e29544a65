//! What a [`Candidate`](rayless_control::Candidate) asks of the store, done: requests one after the other, each with a limit and at each
//! server in turn, and a watch that shows the store anew after each change.

use super::{
    StoreConfig, StoreError,
    etcd::{Etcd, Seat, Servers, within},
};
use rayless_control::election::{Effect, Input};
use rayless_proto::v1::status::HeadSeat;
use std::time::Duration;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::sleep,
};

/// Between two attempts to watch; the first comes at once.
const WATCH_RETRY: Duration = Duration::from_secs(1);
/// How long the end of a daemon may wait for its lease to be given back.
const GIVE_BACK: Duration = Duration::from_secs(1);

/// News of the store.
#[derive(Debug)]
pub(crate) enum StoreNews {
    /// For the candidate.
    Candidate(Input),
    /// It belongs to a cluster with another token: who its head is.
    Foreign(String),
}

/// The way to the store. Dropping it ends all that is under way.
#[derive(Debug)]
pub(crate) struct StoreHandle {
    asked: mpsc::UnboundedSender<Effect>,
    authorities: watch::Sender<Vec<String>>,
    task: JoinHandle<()>,
}

/// Opens it. Nothing is connected before the first request.
pub(crate) fn open(
    config: StoreConfig,
    seat: HeadSeat,
    authorities: Vec<String>,
    lease: Duration,
) -> (StoreHandle, mpsc::UnboundedReceiver<StoreNews>) {
    let (news, told) = mpsc::unbounded_channel();
    let (asked, requests) = mpsc::unbounded_channel();
    let (accepted, held) = watch::channel(authorities.clone());
    let drive = Drive {
        servers: Servers::new(config),
        seat: Seat { seat, authorities },
        held,
        lease,
        link: None,
        known: false,
        watch: None,
        news,
    };
    (StoreHandle { asked, authorities: accepted, task: tokio::spawn(drive.run(requests)) }, told)
}

impl StoreHandle {
    /// Has it done.
    pub(crate) fn ask(&self, effect: Effect) {
        let _ = self.asked.send(effect);
    }

    /// Seats that are taken from here on name these authorities.
    pub(crate) fn accept(&self, authorities: Vec<String>) {
        self.authorities.send_replace(authorities);
    }

    /// Ends it, once what was asked is done, or after a second.
    pub(crate) async fn close(self) {
        let Self { asked, task, .. } = self;
        drop(asked);
        let abort = task.abort_handle();
        if tokio::time::timeout(GIVE_BACK, task).await.is_err() {
            abort.abort();
        }
    }
}

struct Drive {
    servers: Servers,
    seat: Seat,
    /// Names of the authorities that this daemon accepts.
    held: watch::Receiver<Vec<String>>,
    lease: Duration,
    /// The connection for requests.
    link: Option<Etcd>,
    /// Whether those that are there already have been found to be of this cluster.
    known: bool,
    watch: Option<JoinHandle<()>>,
    news: mpsc::UnboundedSender<StoreNews>,
}

impl Drive {
    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<Effect>) {
        while let Some(effect) = requests.recv().await {
            self.seat.authorities.clone_from(&self.held.borrow());
            let attempt = match &effect {
                Effect::Register { attempt, .. } | Effect::Renew { attempt, .. } | Effect::Claim { attempt, .. } => {
                    Some(*attempt)
                }
                _ => None,
            };
            match (self.done(&effect).await, attempt) {
                (Ok(Some(answer)), _) => self.tell(StoreNews::Candidate(answer)),
                (Ok(None), _) => {}
                (Err(StoreError::LeaseOver), Some(attempt)) if matches!(effect, Effect::Renew { .. }) => {
                    self.tell(StoreNews::Candidate(Input::LeaseOver(attempt)));
                }
                (Err(error), Some(attempt)) => {
                    tracing::debug!(%error, "the store");
                    self.tell(StoreNews::Candidate(Input::StoreFailed(attempt, error.to_string())));
                }
                (Err(error), None) if matches!(effect, Effect::GiveBack(_)) => {
                    tracing::info!(%error, "a lease could not be given back; it ends by itself");
                }
                // Asked again with the next renewal.
                (Err(error), None) => tracing::debug!(%error, "the store"),
            }
            if matches!(effect, Effect::Register { .. }) && self.link.is_some() && self.watch.is_none() {
                self.watch =
                    Some(tokio::spawn(keep_watching(self.servers.clone(), self.patience(), self.news.clone())));
            }
        }
        self.watch.take().inspect(JoinHandle::abort);
    }

    fn tell(&self, news: StoreNews) {
        let _ = self.news.send(news);
    }

    /// For one attempt at one server: several must find room in a lease.
    fn patience(&self) -> Duration {
        self.lease / 4
    }

    /// Tries each server, and the present one once more on a fresh connection: the kept one may have gone stale.
    async fn done(&mut self, effect: &Effect) -> Result<Option<Input>, StoreError> {
        let mut failed = StoreError::Unreachable("no answer".to_owned());
        for _ in 0..=self.servers.count() {
            let (at, fresh) = (self.servers.present(), self.link.is_none());
            match within(self.patience(), self.once(effect)).await {
                Err(error @ StoreError::Unreachable(_)) => {
                    self.link = None;
                    if fresh {
                        self.servers.move_on(at);
                    }
                    failed = error;
                }
                other => return other,
            }
        }
        Err(failed)
    }

    async fn once(&mut self, effect: &Effect) -> Result<Option<Input>, StoreError> {
        let etcd = match self.link.take() {
            Some(etcd) => self.link.insert(etcd),
            None => self.link.insert(Etcd::open(&self.servers).await?),
        };
        Ok(match *effect {
            Effect::Register { attempt, give_back } => {
                if !self.known {
                    let (view, others) = etcd.view().await?;
                    // Seats of before a rotation name the old authority: whoever has the present one belongs here.
                    let ours = view.authority.is_some_and(|named| self.seat.authorities.contains(&named));
                    let foreign = |other: &Seat| !other.authorities.iter().any(|a| self.seat.authorities.contains(a));
                    if let Some(other) = others.iter().find(|other| !ours && foreign(other)) {
                        self.tell(StoreNews::Foreign(format!("{} ({})", other.seat.name, other.seat.address)));
                        return Ok(None);
                    }
                    self.known = true;
                }
                if let Some(lease) = give_back {
                    etcd.revoke(lease).await?;
                }
                let (lease, lease_time) = etcd.grant(self.lease).await?;
                etcd.sit(&self.seat, lease).await?;
                Some(Input::Registered { attempt, lease, lease_time })
            }
            Effect::Renew { attempt, lease } => {
                etcd.keep_alive(lease).await?;
                Some(Input::Renewed(attempt))
            }
            Effect::Claim { attempt, lease, term, after, key_revision, cluster } => {
                match etcd.claim(&self.seat, lease, term, after, key_revision, cluster).await? {
                    Some(revision) => Some(Input::Claimed { attempt, term, cluster, revision }),
                    None => Some(Input::NotClaimed(attempt)),
                }
            }
            Effect::NameAuthority { key_revision, ref authority } => {
                etcd.name_authority(key_revision, authority).await?;
                None
            }
            Effect::GiveBack(lease) => {
                etcd.revoke(lease).await?;
                None
            }
            // The daemon's own matters.
            _ => None,
        })
    }
}

async fn keep_watching(servers: Servers, patience: Duration, news: mpsc::UnboundedSender<StoreNews>) {
    loop {
        let at = servers.present();
        let error = tokio::select! {
            error = watched(&servers, patience, &news) => error,
            // Requests got no answer there: a server that is cut off from the others would show no changes either.
            () = servers.moved() => continue,
        };
        tracing::info!("the watch of the store ended: {error}");
        if matches!(error, StoreError::Unreachable(_)) {
            servers.move_on(at);
        }
        sleep(WATCH_RETRY).await;
    }
}

/// Shows the store, then again after each change; why it ended.
async fn watched(servers: &Servers, patience: Duration, news: &mpsc::UnboundedSender<StoreNews>) -> StoreError {
    let begin = async {
        let mut etcd = Etcd::open(servers).await?;
        let (view, _) = etcd.view().await?;
        etcd.watch(view.revision).await?;
        Ok((etcd, view))
    };
    let (mut etcd, view) = match within(patience, begin).await {
        Ok(begun) => begun,
        Err(error) => return error,
    };
    let _ = news.send(StoreNews::Candidate(Input::Observed(view)));
    loop {
        if let Err(error) = etcd.changed().await {
            return error;
        }
        // The watch's connection is taken by the watch.
        let look = async { Etcd::open(servers).await?.view().await };
        match within(patience, look).await {
            Ok((view, _)) => drop(news.send(StoreNews::Candidate(Input::Observed(view)))),
            Err(error) => return error,
        }
    }
}
