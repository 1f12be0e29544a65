//! The script language of the stories. One command a line, `#` starts a comment.
//!
//! ```text
//! dead-after 3s                             # before the first node
//! node a: 8 GPU, 64 CPU                     # the first node is the head's; `off`: not started yet; `vllm=0.32.0`; `seen as 1.2.3.4`
//! start b / kill daemon b / restart daemon b / power off b / power on b / leave b / lose head state
//! launch g from a: 16 x {GPU:1} [+ 2 x {CPU:1}] [SPREAD] [wait 10s] [in pg] [with vllm=0.32.0]
//! stop g / kill driver g / cancel g / kill worker g 3 / kill keeper g on b / end g at b / end all at b
//! reserve pg from a: 2 x {GPU:8} [STRICT_SPREAD] [wait 10s]   /   remove pg
//! cut a b / cut a -> b / cut udp a b / heal a b / delay a b 200ms / jitter a b 50ms / loss a b 30% / duplicates a b 20%
//! link g 0 1 tcp / unlink g 0 1             # both ends of a link between two ranks tell of it
//! break b                                   # its session with the head ends
//! store lease 3s                            # before the first node: several are `head`; nodes join by the addresses of the first two
//! store down / store up / store forgets / store cut a / store heal a / store delay 300ms / freeze a (its clock stands still; `resume`)
//! rotate [30s] / finish rotation / cannot finish rotation / disk full b / disk free b
//! pause b / resume b / late b 450ms / mute b / unmute b / drain b 3 / drained b 3
//! wait 3s
//! expect X / within 2s expect X / for 5s expect X
//! ```
//! What can be expected is in `Story::expect`.

use super::{
    daemon::Asker,
    steps::{DriverState, ReservationState},
    world::{MS, World, host_of},
};
use rayless_proto::{
    ids::{ClusterId, NodeId},
    resources::{Quantity, Resources, Strategy},
    v1::{
        control::{GroupSpec, ToHead},
        link::{LinkState, LinkTransport},
        status::{GroupStatus, LinkStatus},
    },
};
use std::time::Duration;

type Outcome = Result<(), String>;

pub struct Story {
    pub world: World,
    cluster: Option<ClusterId>,
}

/// Runs a story. A failure names the line and shows the state.
pub fn run(text: &str) -> Result<World, String> {
    let mut story = Story { world: World::new(1), cluster: None };
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        story.world.say(format!("> {line}"));
        let result = story.line(line).and_then(|()| story.world.broken.clone().map_or(Ok(()), Err));
        if let Err(cause) = result {
            return Err(format!("line {}: {line}\n    {cause}\n{}", number + 1, story.world.dump()));
        }
    }
    Ok(story.world)
}

fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is no duration");
    let (number, unit) = text.strip_suffix("ms").map_or_else(|| (text.trim_end_matches('s'), 1.0), |n| (n, 0.001));
    number.parse::<f64>().map(|n| Duration::from_secs_f64(n * unit)).map_err(|_| bad())
}

fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("`{text}` is no number"))
}

fn percent(text: &str) -> Result<u64, String> {
    text.trim_end_matches('%').parse().map_err(|_| format!("`{text}` is no percentage"))
}

fn quantity(text: &str) -> Result<Quantity, String> {
    let number: f64 = text.trim().parse().map_err(|_| format!("`{text}` is no quantity"))?;
    Quantity::from_f64(number).map_err(|e| e.to_string())
}

/// `8 GPU, 64 CPU`; what is not of that form is handed back.
fn amounts(text: &str) -> Result<(Resources, Vec<String>), String> {
    let mut resources = Resources::new();
    let mut rest = Vec::new();
    for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
        match item.split_once(' ') {
            Some((n, name)) if n.parse::<f64>().is_ok() => resources.set(name.trim(), quantity(n)?),
            _ => rest.push(item.to_owned()),
        }
    }
    Ok((resources, rest))
}

/// `16 x {GPU:1, CPU:2} + 2 x {CPU:1} SPREAD wait 10s in pg with vllm=0.32.0`
struct Request {
    bundles: Vec<Resources>,
    strategy: Strategy,
    wait: Duration,
    within: Option<String>,
    versions: Vec<(String, String)>,
}

fn request(text: &str) -> Result<Request, String> {
    let mut bundles = Vec::new();
    let mut rest = text.trim();
    loop {
        let (count, tail) = rest.split_once('x').ok_or("expected `N x {…}`")?;
        let count: usize = count.trim().parse().map_err(|_| format!("`{count}` is no count"))?;
        let tail = tail.trim().strip_prefix('{').ok_or("expected `{`")?;
        let (inside, tail) = tail.split_once('}').ok_or("expected `}`")?;
        let mut bundle = Resources::new();
        for item in inside.split(',').filter(|i| !i.trim().is_empty()) {
            let (name, n) = item.split_once(':').ok_or("expected `NAME:N`")?;
            bundle.set(name.trim(), quantity(n)?);
        }
        bundles.extend(vec![bundle; count]);
        rest = tail.trim();
        match rest.strip_prefix('+') {
            Some(more) => rest = more.trim(),
            None => break,
        }
    }
    let mut r = Request {
        bundles,
        strategy: Strategy::Pack,
        wait: Duration::from_secs(600),
        within: None,
        versions: Vec::new(),
    };
    let mut words = rest.split_whitespace();
    while let Some(word) = words.next() {
        let mut next = || words.next().ok_or_else(|| format!("`{word}` wants a value"));
        match word {
            "wait" => r.wait = duration(next()?)?,
            "in" => r.within = Some(next()?.to_owned()),
            "with" => {
                let (name, version) = next()?.split_once('=').ok_or("expected NAME=VERSION")?;
                r.versions.push((name.to_owned(), version.to_owned()));
            }
            other => r.strategy = Strategy::from_name(other).ok_or_else(|| format!("what is `{other}`?"))?,
        }
    }
    Ok(r)
}

fn ranks(text: &str) -> Result<Vec<u32>, String> {
    let mut all = Vec::new();
    for part in text.split(',') {
        let bad = |_| format!("`{text}` are no ranks");
        match part.split_once('-') {
            Some((a, b)) => all.extend(a.parse::<u32>().map_err(bad)?..=b.parse::<u32>().map_err(bad)?),
            None => all.push(part.parse().map_err(bad)?),
        }
    }
    Ok(all)
}

impl Story {
    fn host(&self, name: &str) -> Result<usize, String> {
        self.world.host(name).ok_or_else(|| format!("there is no node `{name}`"))
    }

    fn driver(&self, name: &str) -> Result<usize, String> {
        self.world.driver(name).ok_or_else(|| format!("nothing called `{name}` was launched"))
    }

    fn reservation(&self, name: &str) -> Result<usize, String> {
        let found = self.world.reservations.iter().rposition(|r| r.name == name);
        found.ok_or_else(|| format!("nothing called `{name}` was reserved"))
    }

    fn line(&mut self, line: &str) -> Outcome {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["dead-after", t] => self.world.dead_after = duration(t)?,
            ["seed", n] => self.world.rng.0 = n.parse().map_err(|_| "no seed")?,
            ["node", ..] => return self.node(line),
            ["start", h] => {
                let host = self.host(h)?;
                self.world.start(host);
            }
            ["kill", "daemon", h] => {
                let host = self.host(h)?;
                self.world.kill_daemon(host);
            }
            ["restart", "daemon", h] => {
                let host = self.host(h)?;
                self.world.kill_daemon(host);
                self.world.start(host);
            }
            ["power", "off", h] => {
                let host = self.host(h)?;
                self.world.kill_host(host);
            }
            ["power", "on", h] => {
                let host = self.host(h)?;
                self.world.start(host);
            }
            ["leave", h] => {
                let host = self.host(h)?;
                self.world.leave(host);
            }
            ["lose", "head", "state"] => {
                self.world.hosts[0].head_state = None;
            }
            ["damage", "head", "state"] => {
                if let Some(last) = self.world.hosts[0].head_state.as_mut().and_then(|s| s.last_mut()) {
                    *last ^= 1;
                }
            }
            ["launch", ..] => return self.launch(line),
            ["reserve", ..] => return self.reserve(line),
            ["remove", pg] => {
                let at = self.reservation(pg)?;
                self.world.remove_reservation(at);
            }
            ["stop", g] => {
                let driver = self.driver(g)?;
                self.world.stop_driver(driver);
            }
            ["kill", "driver", g] => {
                let driver = self.driver(g)?;
                self.world.kill_driver(driver);
            }
            ["cancel", g] => {
                let driver = self.driver(g)?;
                self.world.vanish(driver);
            }
            ["kill", "worker", g, rank] => {
                let driver = self.driver(g)?;
                let rank = rank.parse().map_err(|_| "no rank")?;
                if !self.world.kill_worker(driver, rank) {
                    return Err(format!("{g} has no rank {rank}"));
                }
            }
            ["kill", "keeper", g, "on", h] => {
                let (driver, host) = (self.driver(g)?, self.host(h)?);
                self.world.kill_keeper(driver, host);
            }
            ["end", g, "at", h] => {
                let host = self.host(h)?;
                let group = if *g == "all" { None } else { self.world.drivers[self.driver(g)?].group };
                if *g != "all" && group.is_none() {
                    return Err(format!("{g} is no group yet"));
                }
                let label = format!("end {g}");
                self.world.answers.remove(&label);
                self.world.ask(host, Asker::Operator(label), |request| ToHead::StopGroup { request, group });
            }
            ["cut", "udp", a, b] => self.links(a, b, |l| l.udp = false)?,
            ["cut", a, "->", b] => {
                let (a, b) = (self.host(a)?, self.host(b)?);
                self.world.link(a, b).up = false;
            }
            ["cut", a, b] => self.links(a, b, |l| l.up = false)?,
            ["heal", a, b] => self.links(a, b, |l| (l.up, l.udp) = (true, true))?,
            ["delay", a, b, t] => {
                let t = duration(t)?;
                self.links(a, b, |l| l.delay = t)?;
            }
            ["jitter", a, b, t] => {
                let t = duration(t)?;
                self.links(a, b, |l| l.jitter = t)?;
            }
            ["loss", a, b, p] => {
                let p = percent(p)?;
                self.links(a, b, |l| l.loss = p)?;
            }
            ["duplicates", a, b, p] => {
                let p = percent(p)?;
                self.links(a, b, |l| l.duplicates = p)?;
            }
            ["link", g, from, to, transport] => {
                let ends = (number(from)?, number(to)?);
                let all = [LinkTransport::Tcp, LinkTransport::Rdma, LinkTransport::Shm];
                let transport = all.into_iter().find(|t| t.name() == *transport).ok_or("no transport")?;
                self.world.report_link(self.driver(g)?, ends, transport, LinkState::Open);
            }
            ["unlink", g, from, to] => {
                let ends = (number(from)?, number(to)?);
                self.world.report_link(self.driver(g)?, ends, LinkTransport::Tcp, LinkState::Closed);
            }
            ["break", h] => {
                let host = self.host(h)?;
                self.world.break_session(host);
            }
            ["pause", h] => {
                let host = self.host(h)?;
                self.world.pause(host);
            }
            ["resume", h] => {
                let host = self.host(h)?;
                self.world.resume(host);
            }
            ["freeze", h] => {
                let host = self.host(h)?;
                self.world.freeze(host);
            }
            ["store", "lease", t] => {
                let t = duration(t)?;
                self.world.use_store(t);
            }
            ["store", "up"] => self.world.store_up(),
            ["store", what @ ..] => return self.store(what),
            ["late", h, t] => {
                let host = self.host(h)?;
                self.world.hosts[host].late = duration(t)?;
            }
            ["mute", h] => {
                let host = self.host(h)?;
                self.world.hosts[host].mute = true;
            }
            ["unmute", h] => {
                let host = self.host(h)?;
                self.world.hosts[host].mute = false;
            }
            ["drain" | "drained", h, gpu] => {
                let host = self.host(h)?;
                let gpu: u32 = gpu.parse().map_err(|_| "no GPU index")?;
                let draining = words[0] == "drain";
                if let Some(daemon) = self.world.hosts[host].daemon.as_mut() {
                    let _ = if draining { daemon.draining.insert(gpu) } else { daemon.draining.remove(&gpu) };
                }
                self.world.tell_head(host, ToHead::GpuDraining { gpus: vec![(gpu, draining)] });
            }
            ["rotate", overlap @ ..] => {
                let overlap = overlap.first().map(|t| duration(t)).transpose()?;
                self.world.rotate(overlap);
            }
            ["finish", "rotation"] => return self.world.finish_rotation(),
            ["cannot", "finish", "rotation"] => {
                return self.world.finish_rotation().map_or(Ok(()), |()| Err("but it can".into()));
            }
            ["give", "token", from, to] => {
                let (from, to) = (self.host(from)?, self.host(to)?);
                self.world.hosts[to].tokens = self.world.hosts[from].tokens.clone();
            }
            ["disk", full, h] => {
                let host = self.host(h)?;
                self.world.hosts[host].disk_full = *full == "full";
            }
            ["wait", t] => {
                let t = duration(t)?;
                self.world.wait(t);
            }
            ["expect", ..] => {
                let what = line.strip_prefix("expect").unwrap_or_default().trim().to_owned();
                return self.expect(&what);
            }
            ["within", t, "expect", ..] => {
                let end = self.world.now + duration(t)?;
                let what = line.split_once("expect").map(|w| w.1.trim().to_owned()).unwrap_or_default();
                loop {
                    match self.expect(&what) {
                        Ok(()) => return Ok(()),
                        Err(cause) if self.world.now >= end => return Err(cause),
                        Err(_) => self.world.wait(10 * MS),
                    }
                    if self.world.broken.is_some() {
                        return Ok(());
                    }
                }
            }
            ["for", t, "expect", ..] => {
                let end = self.world.now + duration(t)?;
                let what = line.split_once("expect").map(|w| w.1.trim().to_owned()).unwrap_or_default();
                while self.world.now < end && self.world.broken.is_none() {
                    self.expect(&what)?;
                    self.world.wait(10 * MS);
                }
            }
            _ => return Err("no such command".into()),
        }
        Ok(())
    }

    fn store(&mut self, what: &[&str]) -> Outcome {
        let host = what.get(1).and_then(|h| self.world.host(h));
        let store = self.world.store.as_mut().ok_or("there is no store")?;
        match (what, host) {
            (["down"], _) => store.up = false,
            (["forgets"], _) => store.lose_memory(),
            (["delay", t], _) => store.delay = duration(t)?,
            (["cut", _], Some(host)) => drop(store.cut.insert(host)),
            (["heal", _], Some(host)) => drop(store.cut.remove(&host)),
            _ => return Err("no such command of the store".into()),
        }
        Ok(())
    }

    fn links(&mut self, a: &str, b: &str, change: impl Fn(&mut super::wire::Link)) -> Outcome {
        let (a, b) = (self.host(a)?, self.host(b)?);
        change(self.world.link(a, b));
        change(self.world.link(b, a));
        Ok(())
    }

    fn node(&mut self, line: &str) -> Outcome {
        let (name, what) =
            line.strip_prefix("node").and_then(|l| l.split_once(':')).ok_or("expected `node NAME: …`")?;
        let (resources, flags) = amounts(what)?;
        let host = self.world.add_host(name.trim(), resources);
        let mut off = false;
        for flag in flags {
            if flag == "off" {
                off = true;
            } else if flag == "head" {
                self.world.hosts[host].is_head = true;
            } else if let Some(address) = flag.strip_prefix("seen as ") {
                self.world.hosts[host].seen_as = Some(address.to_owned());
            } else if let Some((name, version)) = flag.split_once('=') {
                self.world.hosts[host].versions.push((name.to_owned(), version.to_owned()));
            } else {
                return Err(format!("what is `{flag}`?"));
            }
        }
        if !off {
            self.world.start(host);
        }
        Ok(())
    }

    fn launch(&mut self, line: &str) -> Outcome {
        let (head, what) = line.split_once(':').ok_or("expected `launch G from NODE: …`")?;
        let words: Vec<&str> = head.split_whitespace().collect();
        let ["launch", name, "from", host] = words.as_slice() else {
            return Err("expected `launch G from NODE:`".into());
        };
        let host = self.host(host)?;
        let r = request(what)?;
        let placement_group = match r.within {
            None => None,
            Some(pg) => Some(self.world.reservations[self.reservation(&pg)?].id.ok_or("it is not placed")?),
        };
        let spec = GroupSpec {
            name: String::new(),
            bundles: r.bundles,
            strategy: r.strategy,
            driver_node: NodeId([0; 32]),
            driver_pid: 0,
            wait_ms: u64::try_from(r.wait.as_millis()).unwrap_or(u64::MAX),
            placement_group,
            driver_versions: r.versions,
        };
        self.world.launch(name, host, spec);
        Ok(())
    }

    fn reserve(&mut self, line: &str) -> Outcome {
        let (head, what) = line.split_once(':').ok_or("expected `reserve PG from NODE: …`")?;
        let words: Vec<&str> = head.split_whitespace().collect();
        let ["reserve", name, "from", host] = words.as_slice() else {
            return Err("expected `reserve PG from NODE:`".into());
        };
        let host = self.host(host)?;
        let r = request(what)?;
        let wait_ms = u64::try_from(r.wait.as_millis()).unwrap_or(u64::MAX);
        let title = (*name).to_owned();
        self.world.reserve(name, host, |request| ToHead::CreatePlacementGroup {
            request,
            name: title,
            bundles: r.bundles,
            strategy: r.strategy,
            wait_ms,
        });
        Ok(())
    }

    fn group(&self, name: &str) -> Result<Option<GroupStatus>, String> {
        let status = self.world.status().ok_or("there is no head")?;
        // A group of that name that is live, else the last that ended.
        let mut found: Vec<GroupStatus> = status.groups.into_iter().filter(|g| g.name == name).collect();
        let wanted = self.world.driver(name).and_then(|d| self.world.drivers[d].group);
        if let Some(at) = found.iter().position(|g| Some(g.id) == wanted) {
            return Ok(Some(found.swap_remove(at)));
        }
        Ok(found.pop())
    }

    /// What can be expected.
    fn expect(&mut self, what: &str) -> Outcome {
        let (plain, text) = match what.split_once('"') {
            Some((plain, rest)) => (plain.trim(), Some(rest.trim_end_matches('"'))),
            None => (what, None),
        };
        let words: Vec<&str> = plain.split_whitespace().collect();
        let contains = |said: &str| match text {
            Some(text) if !said.contains(text) => Err(format!("but it says `{said}`")),
            _ => Ok(()),
        };
        match words.as_slice() {
            ["head", "none"] => match self.world.status() {
                None => Ok(()),
                Some(status) => Err(format!("but it is {}", self.world.hosts[host_of(status.head)].name)),
            },
            ["head", h, rest @ ..] => {
                let status = self.world.status().ok_or("but there is none")?;
                let is = (self.world.hosts[host_of(status.head)].name.clone(), format!("{}", status.term.0));
                let wanted = (*h, rest.get(1).copied().unwrap_or(&is.1));
                if (is.0.as_str(), is.1.as_str()) == wanted { Ok(()) } else { Err(format!("but it is {is:?}")) }
            }
            ["standby", h, rest @ ..] => {
                let status = self.world.status().ok_or("but there is no head")?;
                let found = status.heads.iter().any(|seat| seat.name == *h && !seat.active);
                if found != (rest == ["gone"]) { Ok(()) } else { Err(format!("but the heads are {:?}", status.heads)) }
            }
            ["believes", h, ..] => {
                let host = self.host(h)?;
                let clock = self.world.lease_clock(host);
                let daemon = self.world.hosts[host].daemon.as_ref();
                let holds = daemon.and_then(|d| d.candidate.as_ref()).is_some_and(|c| c.holds(clock));
                if holds { Ok(()) } else { Err("but it knows that it is not".into()) }
            }
            ["follows", h, head] => {
                let (host, wanted) = (self.host(h)?, self.host(head)?);
                let welcomed = self.world.hosts[host].daemon.as_ref().is_some_and(|d| d.member.is_welcomed());
                let is = self.world.head_of(host).filter(|_| welcomed);
                if is == Some(wanted) { Ok(()) } else { Err(format!("but it follows {is:?}")) }
            }
            ["node", h, state] => {
                let status = self.world.status().ok_or("there is no head")?;
                let node = status.nodes.iter().find(|n| n.name == *h);
                let is = node.map_or("unknown", |n| n.state.name());
                if is == *state { Ok(()) } else { Err(format!("but it is {is}")) }
            }
            ["life", h, n] => {
                let host = self.host(h)?;
                let is = self.world.hosts[host].incarnation;
                if is.to_string() == *n { Ok(()) } else { Err(format!("but it is {is}")) }
            }
            ["refused", h] => {
                let host = self.host(h)?;
                let refusal = self.world.hosts[host].refused.as_ref().ok_or("but it is not")?;
                contains(&format!("{} (hint: {})", refusal.cause, refusal.hint))
            }
            ["group", g, "unknown"] => match self.group(g)? {
                None => Ok(()),
                Some(group) => Err(format!("but it is {}", group.state.name())),
            },
            ["group", g, state] => {
                let group = self.group(g)?.ok_or("but the head does not know it")?;
                if group.state.name() != *state {
                    return Err(format!("but it is {} `{}`", group.state.name(), group.cause));
                }
                contains(&group.cause)
            }
            ["gpus", g, "rank", rank, rest @ ..] => {
                let group = self.group(g)?.ok_or("but the head does not know it")?;
                let rank: u32 = rank.trim_end_matches(':').parse().map_err(|_| "no rank")?;
                let wanted = ranks(&rest.concat())?;
                let worker = group.workers.iter().find(|w| w.rank == rank).ok_or("but there is no such rank")?;
                if worker.gpus == wanted { Ok(()) } else { Err(format!("but they are {:?}", worker.gpus)) }
            }
            ["free", ..] => {
                let (name, what) = plain.strip_prefix("free").and_then(|p| p.split_once(':')).ok_or("expected `:`")?;
                let wanted = amounts(what)?.0;
                let status = self.world.status().ok_or("there is no head")?;
                let node = status.nodes.iter().find(|n| n.name == name.trim()).ok_or("but it is not there")?;
                let same = wanted.iter().all(|(name, q)| node.available.get(name) == q);
                if same { Ok(()) } else { Err(format!("but free is {:?}", node.available)) }
            }
            ["gpu", h, index, state] => {
                let status = self.world.status().ok_or("there is no head")?;
                let node = status.nodes.iter().find(|n| n.name == *h).ok_or("but it is not there")?;
                let gpu = node.gpus.iter().find(|g| g.index.to_string() == *index).ok_or("but there is none")?;
                if gpu.state.name() == *state { Ok(()) } else { Err(format!("but it is {}", gpu.state.name())) }
            }
            ["event", kind] => {
                let events = self.world.status().ok_or("there is no head")?.events;
                let said = events.iter().filter(|e| e.kind == *kind).map(|e| e.cause.as_str());
                contains(&said.collect::<Vec<_>>().join("\n"))
            }
            ["keepers", h, n] => {
                let is = self.world.hosts[self.host(h.trim_end_matches(':'))?].keepers.len();
                if is.to_string() == *n { Ok(()) } else { Err(format!("but there are {is}")) }
            }
            ["links", g, wanted @ ..] => {
                let group = self.group(g.trim_end_matches(':'))?.ok_or("but the head does not know it")?.id;
                let links = self.world.status().ok_or("there is no head")?.links;
                let of_it = links.iter().filter(|link| link.group == group);
                let name = |link: &LinkStatus| {
                    format!("{}->{}:{}", link.from, link.to, link.transport.map_or("?", LinkTransport::name))
                };
                let are: Vec<String> = of_it.map(name).collect();
                if are == wanted { Ok(()) } else { Err(format!("but they are {are:?}")) }
            }
            ["placement", "groups:", n] => {
                let is = self.world.status().ok_or("there is no head")?.placement_groups.len();
                if is.to_string() == *n { Ok(()) } else { Err(format!("but there are {is}")) }
            }
            ["token", h, "behind"] => {
                let behind = self.world.head().ok_or("there is no head")?.without_token();
                let found =
                    behind.iter().find(|(name, _)| name == h).ok_or_else(|| format!("but only {behind:?} are"))?;
                contains(&found.1)
            }
            ["tokens", h, n] => {
                let is = &self.world.hosts[self.host(h.trim_end_matches(':'))?].tokens;
                let is = is.iter().map(|mark| mark.0[7].to_string()).collect::<Vec<_>>().join(",");
                if is == *n { Ok(()) } else { Err(format!("but they are {is}")) }
            }
            ["rotation", state] => {
                let token = self.world.status().ok_or("there is no head")?.token;
                let is = match (token.rotating, token.behind.is_empty()) {
                    (false, _) => "over",
                    (true, true) => "spread",
                    (true, false) => "on",
                };
                if is == *state { Ok(()) } else { Err(format!("but it is {is}")) }
            }
            ["refusals", n] => {
                let is = self.world.status().ok_or("there is no head")?.refused_handshakes;
                if is.to_string() == *n { Ok(()) } else { Err(format!("but there were {is}")) }
            }
            ["all", "free"] => self.world.all_free(),
            ["said"] => {
                let text = text.unwrap_or_default();
                let said = self.world.log.iter().any(|l| !l.contains("> ") && l.contains(text));
                if said { Ok(()) } else { Err("but nobody said so".into()) }
            }
            ["not", "said"] => {
                let text = text.unwrap_or_default();
                let said = self.world.log.iter().find(|l| !l.contains("> ") && l.contains(text));
                said.map_or(Ok(()), |line| Err(format!("but it was: {line}")))
            }
            ["talk", h] => {
                let host = &self.world.hosts[self.host(h)?];
                let waiting = host.daemon.as_ref().and_then(|d| d.member.waiting_for());
                let all: Vec<&String> = host.talk.iter().chain(&waiting).collect();
                let found = all.iter().any(|t| t.contains(text.unwrap_or_default()));
                if found { Ok(()) } else { Err(format!("but it says {all:?}")) }
            }
            ["same", "cluster"] => {
                let id = self.world.status().ok_or("there is no head")?.cluster;
                let first = *self.cluster.get_or_insert(id);
                if first == id { Ok(()) } else { Err(format!("but it was {first:?} and is {id:?}")) }
            }
            ["answer", rest @ ..] => {
                let label = rest.join(" ");
                let said = self.world.answers.get(&label).ok_or("but there is none")?;
                contains(said)
            }
            [name, rest @ ..] if self.world.reservations.iter().any(|r| r.name == *name) => {
                self.expect_reservation(name, rest, text)
            }
            [name, rest @ ..] => self.expect_driver(name, rest, text),
            [] => Err("expect what?".into()),
        }
    }

    fn expect_reservation(&self, name: &str, rest: &[&str], text: Option<&str>) -> Outcome {
        let r = &self.world.reservations[self.reservation(name)?];
        let is = format!("but it is {:?} on {:?}, table {:?}", r.state, r.hosts, r.table.as_ref().map(|t| &t.cause));
        let says = |said: &str| if said.contains(text.unwrap_or_default()) { Ok(()) } else { Err(is.clone()) };
        match (rest, &r.state) {
            (["on", hosts @ ..], ReservationState::Placed) => {
                let names: Vec<&str> = r.hosts.iter().map(|h| self.world.hosts[*h].name.as_str()).collect();
                if names == *hosts { Ok(()) } else { Err(is) }
            }
            (["waiting"], ReservationState::Asking) => says(r.table.as_ref().map_or("", |t| &t.cause)),
            (["refused"], ReservationState::Refused(cause)) => says(cause),
            _ => Err(is),
        }
    }

    fn expect_driver(&self, name: &str, rest: &[&str], text: Option<&str>) -> Outcome {
        let d = &self.world.drivers[self.driver(name)?];
        let table = d.table.as_ref().map(|t| t.cause.clone()).unwrap_or_default();
        let is = format!("but it is {:?}, table `{table}` ({})", d.state, d.tables);
        let says = |said: &str| if said.contains(text.unwrap_or_default()) { Ok(()) } else { Err(is.clone()) };
        match (rest, &d.state) {
            (["placed", seats @ ..], DriverState::Placed) => {
                let mut wanted: Vec<(u32, usize)> = Vec::new();
                for seat in seats {
                    let (host, r) = seat.split_once(':').ok_or("expected NODE:RANKS")?;
                    let host = self.host(host)?;
                    wanted.extend(ranks(r)?.into_iter().map(|rank| (rank, host)));
                }
                wanted.sort_unstable();
                let seated: Vec<(u32, usize)> = d.placements.iter().map(|p| (p.rank, host_of(p.node))).collect();
                if seats.is_empty() || wanted == seated { Ok(()) } else { Err(format!("but the seats are {seated:?}")) }
            }
            (["waiting"], DriverState::Asking) if d.table.is_some() => says(&table),
            (["told", n, "times"], _) => {
                if d.tables.to_string() == *n {
                    Ok(())
                } else {
                    Err(is)
                }
            }
            (["holder", host, gpu], _) => {
                // Who holds a GPU, as the table says.
                let rows = d.table.iter().flat_map(|t| &t.rows).filter(|r| r.node == *host);
                let held: Vec<&(Option<u32>, String)> = rows.flat_map(|r| &r.held).collect();
                let found = held
                    .iter()
                    .any(|h| h.0.is_some_and(|i| i.to_string() == *gpu) && h.1.contains(text.unwrap_or_default()));
                if found { Ok(()) } else { Err(format!("but the table says {held:?}")) }
            }
            (["refused"], DriverState::Refused(cause)) | (["failed"], DriverState::Failed(cause)) => says(cause),
            (["stopped"], DriverState::Stopped)
            | (["killed"], DriverState::Killed)
            | (["asking"], DriverState::Asking) => Ok(()),
            _ => Err(is),
        }
    }
}
