//! The calls to etcd, each as one JSON request of its gateway. What the gateway says of numbers, it says in text.

use super::{StoreConfig, StoreError, http::Connection};
use rayless_control::election::{Throne, View};
use rayless_proto::{
    ids::{ClusterId, Term},
    limits::{MAX_CAUSE, MAX_NAME},
    v1::status::HeadSeat,
};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{sync::Notify, time::timeout};

/// Which of the store's servers is spoken to, and the login there: shared by requests and watch, which move on together.
#[derive(Clone)]
pub(crate) struct Servers {
    config: Arc<StoreConfig>,
    at: Arc<AtomicUsize>,
    token: Arc<Mutex<Option<String>>>,
    moved: Arc<Notify>,
}

impl Servers {
    pub(crate) fn new(config: StoreConfig) -> Self {
        Self { config: Arc::new(config), at: Arc::default(), token: Arc::default(), moved: Arc::default() }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.config.servers.len()
    }

    /// Which one is in use.
    pub(crate) fn present(&self) -> usize {
        self.at.load(Relaxed)
    }

    /// The present one did not answer: the next, unless somebody has moved on meanwhile.
    pub(crate) fn move_on(&self, from: usize) {
        if self.at.compare_exchange(from, (from + 1) % self.count(), Relaxed, Relaxed).is_ok() {
            self.moved.notify_waiters();
        }
    }

    /// Somebody has moved on.
    pub(crate) async fn moved(&self) {
        self.moved.notified().await;
    }

    fn login(&self) -> Option<String> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A connection for requests, or for one watch.
pub(crate) struct Etcd {
    servers: Servers,
    connection: Connection,
}

/// How the seats look in the store.
pub(crate) struct Seat {
    pub(crate) seat: HeadSeat,
    /// Names of the authorities that its daemon accepts.
    pub(crate) authorities: Vec<String>,
}

/// Highest term that is believed. They are counted up from one, so no true one comes near: whoever wrote a higher one into the
/// store would leave none for the next head.
const MAX_TERM: u64 = u64::MAX / 2;

impl Etcd {
    /// On a connection that is there.
    #[cfg(any(test, fuzzing))]
    pub(super) fn over(servers: Servers, connection: Connection) -> Self {
        Self { servers, connection }
    }

    /// Connects to the present server, and logs in where that is asked for.
    pub(crate) async fn open(servers: &Servers) -> Result<Self, StoreError> {
        let config = servers.config.clone();
        let server = &config.servers[servers.present() % config.servers.len()];
        let connection = Connection::open(server, config.tls.as_ref()).await?;
        let mut etcd = Self { servers: servers.clone(), connection };
        if config.login.is_some() && servers.login().is_none() {
            etcd.log_in().await?;
        }
        Ok(etcd)
    }

    async fn log_in(&mut self) -> Result<(), StoreError> {
        let Some(login) = self.servers.config.login.clone() else { return Ok(()) };
        let body = json!({ "name": login.user, "password": login.password });
        let answer = self.call_once("auth/authenticate", &body, None).await?;
        let token = answer["token"].as_str().ok_or_else(|| odd("a login without a token"))?.to_owned();
        *self.servers.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
        Ok(())
    }

    async fn call(&mut self, what: &str, body: Value) -> Result<Value, StoreError> {
        let token = self.servers.login();
        match self.call_once(what, &body, token.as_deref()).await {
            // Logins end after some minutes.
            Err(StoreError::Denied(_)) if token.is_some() => {
                self.log_in().await?;
                let token = self.servers.login();
                self.call_once(what, &body, token.as_deref()).await
            }
            answer => answer,
        }
    }

    async fn call_once(&mut self, what: &str, body: &Value, token: Option<&str>) -> Result<Value, StoreError> {
        let status = self.connection.ask(&format!("/v3/{what}"), &body.to_string(), token).await?;
        let text = self.connection.body().await?;
        if status == 200 {
            // A stream of one answer has it under `result`.
            let answer: Value = serde_json::from_slice(&text).map_err(|_| odd("an answer that is no JSON"))?;
            return match answer.get("error") {
                Some(error) => {
                    Err(refusal(error["code"].as_u64().or_else(|| error["grpc_code"].as_u64()), &error["message"]))
                }
                None => Ok(answer),
            };
        }
        let answer: Value = serde_json::from_slice(&text).unwrap_or_default();
        if answer.is_null() {
            return Err(odd(&format!("it answers HTTP {status}")));
        }
        Err(refusal(answer["code"].as_u64(), &answer["message"]))
    }

    /// A lease of about `time`: its id and how long it really holds.
    pub(crate) async fn grant(&mut self, time: Duration) -> Result<(u64, Duration), StoreError> {
        let seconds = time.as_secs_f64().ceil();
        let answer = self.call("lease/grant", json!({ "TTL": seconds as u64 })).await?;
        Ok((number(&answer["ID"])?, Duration::from_secs(number(&answer["TTL"])?)))
    }

    /// Renews it.
    pub(crate) async fn keep_alive(&mut self, lease: u64) -> Result<(), StoreError> {
        let answer = self.call("lease/keepalive", json!({ "ID": lease.to_string() })).await?;
        // A lease that is over comes back without a time.
        match answer["result"]["TTL"].as_str().and_then(|time| time.parse::<i64>().ok()) {
            Some(time) if time > 0 => Ok(()),
            _ => Err(StoreError::LeaseOver),
        }
    }

    /// Ends it, with all keys under it. One that is over already is as good.
    pub(crate) async fn revoke(&mut self, lease: u64) -> Result<(), StoreError> {
        match self.call("lease/revoke", json!({ "ID": lease.to_string() })).await {
            Ok(_) | Err(StoreError::LeaseOver) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes a seat under a lease.
    pub(crate) async fn sit(&mut self, seat: &Seat, lease: u64) -> Result<(), StoreError> {
        let key = self.key(&format!("seats/{}", seat.seat.node));
        self.call(
            "kv/put",
            json!({ "key": key, "value": encode(seat.json(None).to_string().as_bytes()), "lease": lease.to_string() }),
        )
        .await?;
        Ok(())
    }

    /// Takes the head's key, if neither it nor the terms have changed since they were seen. The store's count; `None` if they have.
    pub(crate) async fn claim(
        &mut self,
        seat: &Seat,
        lease: u64,
        term: Term,
        after: Term,
        key_revision: u64,
        cluster: ClusterId,
    ) -> Result<Option<u64>, StoreError> {
        let (head, terms) = (self.key("head"), self.key("term"));
        let same_terms = if after == Term(0) {
            json!({ "target": "MOD", "key": terms, "result": "EQUAL", "mod_revision": "0" })
        } else {
            json!({ "target": "VALUE", "key": terms, "result": "EQUAL", "value": encode(term_text(after, cluster).as_bytes()) })
        };
        let body = json!({
            "compare": [
                { "target": "MOD", "key": head, "result": "EQUAL", "mod_revision": key_revision.to_string() },
                same_terms,
            ],
            "success": [
                { "request_put": { "key": head, "value": encode(seat.json(Some(term)).to_string().as_bytes()), "lease": lease.to_string() } },
                { "request_put": { "key": terms, "value": encode(term_text(term, cluster).as_bytes()) } },
            ],
        });
        let answer = self.call("kv/txn", body).await?;
        let revision = number(&answer["header"]["revision"])?;
        Ok((answer["succeeded"] == Value::Bool(true)).then_some(revision))
    }

    /// Names the authority that a candidate must accept, if the head's key is still the one of that revision.
    pub(crate) async fn name_authority(&mut self, key_revision: u64, authority: &str) -> Result<(), StoreError> {
        let body = json!({
            "compare": [
                { "target": "MOD", "key": self.key("head"), "result": "EQUAL", "mod_revision": key_revision.to_string() },
            ],
            "success": [
                { "request_put": { "key": self.key("authority"), "value": encode(authority.as_bytes()) } },
            ],
        });
        self.call("kv/txn", body).await.map(drop)
    }

    /// All that is there, and whose seats with which authorities.
    pub(crate) async fn view(&mut self) -> Result<(View, Vec<Seat>), StoreError> {
        let answer = self.call("kv/range", json!({ "key": self.key(""), "range_end": self.end() })).await?;
        let mut view = View {
            revision: number(&answer["header"]["revision"])?,
            head: None,
            seats: Vec::new(),
            term: Term(0),
            cluster: None,
            authority: None,
        };
        let mut seats = Vec::new();
        for pair in answer["kvs"].as_array().into_iter().flatten() {
            let text =
                |name: &str| pair[name].as_str().and_then(decode).and_then(|bytes| String::from_utf8(bytes).ok());
            let (Some(key), Some(value)) = (text("key"), text("value")) else { continue };
            let name = key.strip_prefix(&self.servers.config.prefix).unwrap_or_default();
            match name {
                "term" => {
                    let (term, cluster) = value.split_once(' ').ok_or_else(|| odd("the term makes no sense"))?;
                    let term = term.parse().ok().filter(|term| *term <= MAX_TERM);
                    view.term = Term(term.ok_or_else(|| odd("the term makes no sense"))?);
                    view.cluster = Some(cluster.parse().map_err(|_| odd("the cluster's id makes no sense"))?);
                }
                "authority" => view.authority = Some(value),
                "head" => {
                    let (seat, term) = Seat::read(&value).ok_or_else(|| odd("the head's key makes no sense"))?;
                    let (lease, revision) = (number(&pair["lease"])?, number(&pair["mod_revision"])?);
                    view.head = Some(Throne { seat: seat.seat.clone(), term, lease, revision });
                    seats.push(seat);
                }
                name if name.starts_with("seats/") => {
                    let (seat, _) = Seat::read(&value).ok_or_else(|| odd("a seat makes no sense"))?;
                    view.seats.push(seat.seat.clone());
                    seats.push(seat);
                }
                _ => {}
            }
        }
        Ok((view, seats))
    }

    /// Begins to watch all changes after `revision`; [`Self::changed`] then waits for them.
    pub(crate) async fn watch(&mut self, revision: u64) -> Result<(), StoreError> {
        let body = json!({ "create_request": {
            "key": self.key(""), "range_end": self.end(), "start_revision": revision.saturating_add(1).to_string(),
        } });
        let token = self.servers.login();
        match self.connection.ask("/v3/watch", &body.to_string(), token.as_deref()).await? {
            200 => Ok(()),
            status => Err(odd(&format!("it answers HTTP {status} to a watch"))),
        }
    }

    /// Waits for the next change.
    pub(crate) async fn changed(&mut self) -> Result<(), StoreError> {
        let mut held = Vec::new();
        loop {
            let line = self.connection.line(&mut held).await?;
            let news: Value = serde_json::from_slice(&line).map_err(|_| odd("a change that is no JSON"))?;
            let result = &news["result"];
            if result["canceled"] == Value::Bool(true) || news.get("error").is_some() {
                return Err(odd("it ended the watch"));
            }
            if result["events"].as_array().is_some_and(|events| !events.is_empty()) {
                return Ok(());
            }
        }
    }

    fn key(&self, name: &str) -> String {
        encode(format!("{}{name}", self.servers.config.prefix).as_bytes())
    }

    /// The first key after all of the prefix, which ends in `/`.
    fn end(&self) -> String {
        let mut end = self.servers.config.prefix.clone().into_bytes();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        encode(&end)
    }
}

impl Seat {
    fn json(&self, term: Option<Term>) -> Value {
        json!({
            "node": self.seat.node.to_string(),
            "name": self.seat.name,
            "address": self.seat.address,
            "authorities": self.authorities,
            "term": term.map(|term| term.0),
        })
    }

    fn read(text: &str) -> Option<(Self, Term)> {
        let value: Value = serde_json::from_str(text).ok()?;
        // Shown to people and sent to every node: short, and nothing that a terminal obeys.
        let shown = |name: &str| {
            value[name].as_str().filter(|text| text.len() <= MAX_NAME && !text.chars().any(char::is_control))
        };
        let seat = HeadSeat {
            node: value["node"].as_str()?.parse().ok()?,
            name: shown("name")?.to_owned(),
            address: shown("address")?.to_owned(),
            active: false,
        };
        let authorities =
            value["authorities"].as_array()?.iter().filter_map(|a| Some(a.as_str()?.to_owned())).collect();
        let term = value["term"].as_u64().unwrap_or(0);
        (term <= MAX_TERM).then_some((Self { seat, authorities }, Term(term)))
    }
}

fn term_text(term: Term, cluster: ClusterId) -> String {
    format!("{} {cluster}", term.0)
}

/// gRPC's codes: 5 not found, 7 and 16 not allowed; etcd says 3 (invalid) to a login that does not exist.
fn refusal(code: Option<u64>, message: &Value) -> StoreError {
    let message = message.as_str().unwrap_or("it refuses").trim_start_matches("etcdserver: ");
    // One line for people, whatever it says.
    let message: String = message.chars().filter(|c| !c.is_control()).take(MAX_CAUSE).collect();
    match code {
        Some(5) if message.contains("lease") => StoreError::LeaseOver,
        Some(3 | 7 | 16) => StoreError::Denied(message),
        // Too slow, or without a leader: another server may know better.
        Some(4 | 14) => StoreError::Unreachable(message),
        _ => StoreError::Odd(message),
    }
}

fn odd(what: &str) -> StoreError {
    StoreError::Odd(what.to_owned())
}

fn number(value: &Value) -> Result<u64, StoreError> {
    // The gateway writes 64-bit numbers as text; leases are signed, and used as they come.
    let number = value.as_str().and_then(|text| text.parse().ok()).or_else(|| value.as_u64());
    number.ok_or_else(|| odd("a number is missing in its answer"))
}

/// Within a time.
pub(crate) async fn within<T>(
    time: Duration,
    call: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    timeout(time, call).await.unwrap_or_else(|_| Err(StoreError::Unreachable("no answer".to_owned())))
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base 64 (RFC 4648, padded), in which the gateway writes keys and values.
pub(super) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for at in 0..4 {
            let digit = word >> (18 - 6 * at) & 63;
            text.push(if at <= three.len() { char::from(ALPHABET[digit as usize]) } else { '=' });
        }
    }
    text
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=').bytes();
    let (mut word, mut bits, mut bytes) = (0u32, 0, Vec::with_capacity(text.len() / 4 * 3));
    for digit in digits {
        let value = ALPHABET.iter().position(|known| *known == digit)?;
        word = word << 6 | u32::try_from(value).ok()?;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(word >> bits & 255).ok()?);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayless_proto::ids::NodeId;

    #[test]
    fn base_64_as_in_rfc_4648() {
        let known =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")];
        for (plain, coded) in known {
            assert_eq!(
                (encode(plain.as_bytes()).as_str(), decode(coded).unwrap().as_slice()),
                (coded, plain.as_bytes())
            );
        }
        assert_eq!(decode(&encode(&[255, 0, 254])).unwrap(), [255, 0, 254]);
        assert_eq!(decode("a b"), None);
    }

    /// What a candidate makes of a store with these keys, all of whose numbers are `number`.
    async fn view_of(pairs: &[(&str, &str)], number: u64) -> Result<View, StoreError> {
        let number = number.to_string();
        let kvs: Vec<_> = pairs
            .iter()
            .map(|(key, value)| {
                json!({
                    "key": encode(format!("/rayless/default/{key}").as_bytes()), "value": encode(value.as_bytes()),
                    "lease": number, "mod_revision": number,
                })
            })
            .collect();
        let body = json!({ "header": { "revision": number }, "kvs": kvs, "result": { "events": [1] } }).to_string();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).repeat(2);
        let (near, mut far) = tokio::io::duplex(1 << 16);
        tokio::io::AsyncWriteExt::write_all(&mut far, answer.as_bytes()).await.unwrap();
        let config = StoreConfig::new("etcd://x", &super::super::StoreAccess::default()).unwrap();
        let mut etcd = Etcd::over(Servers::new(config), Connection::over(near));
        let (view, _) = etcd.view().await?;
        etcd.watch(view.revision).await?;
        Ok(view)
    }

    #[tokio::test]
    async fn numbers_at_their_end_are_taken_and_a_term_there_is_refused() {
        let cluster = ClusterId([1; 16]);
        let term = |term: u64| term_text(Term(term), cluster);
        let view = view_of(&[("term", &term(7))], u64::MAX).await.unwrap();
        assert_eq!((view.term, view.revision), (Term(7), u64::MAX));
        let refused = view_of(&[("term", &term(u64::MAX))], 1).await;
        assert_eq!(refused.unwrap_err(), odd("the term makes no sense"));
    }

    #[test]
    fn what_the_store_says_is_one_line() {
        let said = json!(format!("etcdserver: no\u{1b}[2J\n{}", "y".repeat(2 * MAX_CAUSE)));
        let StoreError::Denied(line) = refusal(Some(7), &said) else { panic!("not denied") };
        assert!(line.starts_with("no[2Jyy") && line.len() == MAX_CAUSE, "{line}");
    }

    #[test]
    fn seats_are_read_back_and_nonsense_is_not() {
        let seat = HeadSeat { node: NodeId([7; 32]), name: "a".into(), address: "10.0.0.1:6379".into(), active: false };
        let written = Seat { seat: seat.clone(), authorities: vec!["x".into()] }.json(Some(Term(4))).to_string();
        let (read, term) = Seat::read(&written).unwrap();
        assert_eq!((read.seat, read.authorities, term), (seat, vec!["x".to_owned()], Term(4)));
        let with = |name: &str, value: Value| {
            let mut text: Value = serde_json::from_str(&written).unwrap();
            text[name] = value;
            text.to_string()
        };
        for bad in [
            with("name", json!("a\u{1b}[2J")),
            with("address", json!("1".repeat(MAX_NAME + 1))),
            with("term", json!(u64::MAX)),
            "[".repeat(100_000),
        ] {
            assert!(Seat::read(&bad).is_none(), "{bad:.200}");
        }
        for bad in ["", "{}", "[]", "{\"node\":\"zz\",\"name\":\"a\",\"address\":\"b\",\"authorities\":[]}"] {
            assert!(Seat::read(bad).is_none(), "{bad}");
        }
    }
}
