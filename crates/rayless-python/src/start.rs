//! How a group comes to be: placed by the head, its workers started by the keepers.

use crate::{
    errors,
    group::{Group, Listeners, seconds, tell},
};
use pyo3::{exceptions::PyValueError, prelude::*};
use rayless_proto::{
    ids::{ParseIdError, Rank},
    resources::{Quantity, Resources, Strategy},
    v1::step::Launch,
};
use rayless_worker::driver::{Callbacks, GroupOptions, LogLine, Progress, StartError, StuckReport, WorkerGroup};
use std::{
    collections::HashMap,
    io::Write,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

type Environment = Vec<(String, String)>;

/// Places a group, starts its workers and returns when all take calls.
#[pyfunction]
#[pyo3(signature = (*, run_dir, name, bundles, strategy, placement_group, wait, versions, program, arguments, directory, env, rank_env, boot, start_timeout, log_to_driver, stuck_after, report))]
#[expect(clippy::too_many_arguments, reason = "one keyword each in Python; this is the only caller's view")]
pub(crate) fn start_group(
    py: Python<'_>,
    run_dir: String,
    name: String,
    bundles: Vec<Vec<(String, f64)>>,
    strategy: &str,
    placement_group: Option<&str>,
    wait: f64,
    versions: Environment,
    program: String,
    arguments: Vec<String>,
    directory: String,
    env: Environment,
    rank_env: Vec<Environment>,
    boot: Vec<u8>,
    start_timeout: f64,
    log_to_driver: bool,
    stuck_after: f64,
    report: Py<PyAny>,
) -> PyResult<Group> {
    let options = GroupOptions {
        run_dir: PathBuf::from(&run_dir),
        name,
        bundles: bundles.into_iter().map(resources).collect::<PyResult<_>>()?,
        strategy: Strategy::from_name(strategy).ok_or_else(|| {
            PyValueError::new_err(format!(
                "{strategy} is not a strategy\nhint: one of PACK, SPREAD, STRICT_PACK, STRICT_SPREAD"
            ))
        })?,
        placement_group: placement_group
            .map(str::parse)
            .transpose()
            .map_err(|error: ParseIdError| PyValueError::new_err(error.to_string()))?,
        wait: seconds(wait)?,
        versions,
    };
    let launch =
        Launch { program, arguments, directory, env, rank_env: (0..).zip(rank_env).collect(), boot, links: None };
    let limit = seconds(start_timeout)?;
    let stuck_after = seconds(stuck_after)?;
    let listeners = Arc::new(Mutex::new(Listeners::Waiting(Vec::new())));
    let told = Arc::clone(&listeners);
    let mut watch = Watch { report, interrupted: None, launched: false, ready: (0, options.bundles.len()) };

    let group_name = options.name.clone();
    let mut step_deadline = Duration::ZERO;
    let started = py.detach(|| -> Result<WorkerGroup, StartError> {
        let placed = WorkerGroup::place(options, &mut |news| watch.look(news))?.with_stuck_after(stuck_after);
        step_deadline = placed.step_deadline();
        let nodes = placed.ranks().iter().map(|info| (info.rank, info.node_name.clone())).collect();
        let callbacks = Callbacks {
            on_log: log_to_driver.then(|| show(nodes)),
            on_failure: Some(Box::new(move |failure| tell(&told, &failure))),
            on_stuck: Some(Box::new(move |report| show_stuck(&group_name, &report))),
        };
        placed.launch(launch, limit, callbacks, &mut |news| watch.look(news))
    });
    match (started, watch.interrupted) {
        (Ok(group), None) => Ok(Group::new(group, listeners, run_dir, step_deadline)),
        (Ok(group), Some(interrupted)) => {
            py.detach(|| group.stop());
            Err(interrupted)
        }
        (Err(_), Some(interrupted)) => Err(interrupted),
        (Err(error), None) => Err(errors::start(py, error)),
    }
}

fn resources(bundle: Vec<(String, f64)>) -> PyResult<Resources> {
    let mut all = Resources::new();
    for (name, amount) in bundle {
        let quantity =
            Quantity::from_f64(amount).map_err(|error| PyValueError::new_err(format!("resource {name}: {error}")))?;
        all.set(&name, quantity);
    }
    Ok(all)
}

/// Looks at the news of a start, and at signals.
struct Watch {
    report: Py<PyAny>,
    interrupted: Option<PyErr>,
    /// Workers were started somewhere.
    launched: bool,
    /// How many take calls, of how many.
    ready: (usize, usize),
}

impl Watch {
    /// `false` where the start is to be given up.
    fn look(&mut self, news: Option<Progress>) -> bool {
        let seen = Python::attach(|py| {
            self.tell(py, news)?;
            py.check_signals()
        });
        if let Err(error) = seen {
            self.interrupted.get_or_insert(error);
        }
        self.interrupted.is_none()
    }

    fn tell(&mut self, py: Python<'_>, news: Option<Progress>) -> PyResult<()> {
        match news {
            Some(Progress::Waiting(table)) => {
                self.report.call_method1(py, "waiting", (table.to_string(),))?;
            }
            Some(Progress::WaitingForHead(line)) => {
                self.report.call_method1(py, "waiting", (line,))?;
            }
            Some(Progress::Launched { .. }) => self.launched = true,
            Some(Progress::Ready { ready, of, .. }) => self.ready = (ready, of),
            None if self.launched => {
                self.report.call_method1(py, "starting", self.ready)?;
            }
            None => {}
        }
        Ok(())
    }
}

/// Says on the driver's stderr what the ranks do that make no progress. Without Python: its lock may be what they wait for.
fn show_stuck(group: &str, report: &StuckReport) {
    let text: String = report.lines().iter().map(|line| format!("rayless: {group}: {line}\n")).collect();
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Shows the workers' output on the driver's stderr, a prefix before each line as Ray has it.
fn show(nodes: HashMap<Rank, String>) -> Box<dyn Fn(LogLine) + Send> {
    Box::new(move |line| {
        let node = nodes.get(&line.rank).map_or("?", String::as_str);
        let text = format!("(rank {}, {node}) {}\n", line.rank, line.text);
        // A closed stderr is no reason to end a group.
        let _ = std::io::stderr().write_all(text.as_bytes());
    })
}
