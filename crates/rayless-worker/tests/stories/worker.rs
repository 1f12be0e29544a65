//! The worker of the stories: runs the words that it is called with.

use rayless_worker::host::{Next, Worker};
use std::{
    io::Write,
    process::{Command, ExitCode},
    time::Duration,
};

/// The body of a worker process.
pub(crate) fn main() -> ExitCode {
    let worker = match Worker::from_env() {
        Ok(worker) => worker,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if std::env::var("TEST_FAIL_BOOT").is_ok_and(|rank| rank == worker.rank().to_string()) {
        eprintln!("ImportError: no module named vllm");
        return ExitCode::from(1);
    }
    let version = std::env::var("TEST_VERSION").unwrap_or_else(|_| "1.0".into());
    worker.ready(&[("vllm".into(), version)]).unwrap();
    let mut done = Vec::new();
    loop {
        let call = match worker.next_call(None) {
            Ok(Next::Call(call)) => call,
            Ok(Next::Closed) => return ExitCode::SUCCESS,
            Ok(Next::Nothing) => continue,
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        };
        done.push(call.id);
        let reply = |payload: &[u8]| worker.reply(call.id, false, payload).is_ok();
        let end =
            call.payload.iter().take(4096).position(|byte| *byte == b' ').unwrap_or_else(|| call.payload.len().min(64));
        let word = String::from_utf8_lossy(&call.payload[..end]).into_owned();
        let rest = call.payload.get(end + 1..).unwrap_or_default();
        let text = String::from_utf8_lossy(&rest[..rest.len().min(4096)]).into_owned();
        let number = text.split(' ').next().unwrap_or_default().parse::<u64>().unwrap_or(0);
        let me = worker.rank().to_string();
        // `on 2 raise`: only rank 2 does it, the others answer at once.
        let (word, text, number) = match word.as_str() {
            "on" if text.split(' ').next() != Some(&me) => ("echo".to_owned(), String::new(), 0),
            "on" => {
                let mut words = text.splitn(3, ' ').skip(1);
                let word = words.next().unwrap_or_default().to_owned();
                let text = words.next().unwrap_or_default().to_owned();
                let number = text.parse().unwrap_or(0);
                (word, text, number)
            }
            _ => (word, text, number),
        };
        worker.doing(&word);
        match word.as_str() {
            "done" => {
                let list: Vec<String> = done.iter().map(u64::to_string).collect();
                reply(list.join(" ").as_bytes());
            }
            "sleep" => {
                std::thread::sleep(Duration::from_millis(number));
                reply(me.as_bytes());
            }
            // For `number` times 100 ms, with a word each time.
            "note" => {
                for part in 0..number {
                    worker.doing(&format!("part {part}"));
                    std::thread::sleep(Duration::from_millis(100));
                }
                reply(me.as_bytes());
            }
            "length" => {
                reply(call.payload.len().to_string().as_bytes());
            }
            "big" => {
                reply(&vec![worker.rank() as u8; number as usize]);
            }
            "env" => {
                reply(std::env::var(&text).unwrap_or_else(|_| "(none)".into()).as_bytes());
            }
            "boot" => {
                reply(worker.boot());
            }
            "raise" => {
                let _ = worker.reply(call.id, true, format!("raised on {me}").as_bytes());
            }
            "say" => {
                for line in 0..number.max(1) {
                    println!("out {line} of {me}");
                }
                eprintln!("err of {me}");
                reply(b"");
            }
            "exit" => {
                eprintln!("ValueError: something is wrong");
                std::process::exit(number as i32);
            }
            // Half a line, and the end.
            "mutter" => {
                eprint!("it ends in the middle of");
                std::process::exit(3);
            }
            // A thread that sleeps for ever; its id is the reply.
            "thread" => {
                let (told, id) = std::sync::mpsc::channel();
                std::thread::spawn(move || {
                    told.send(rustix::thread::gettid().as_raw_nonzero().to_string()).unwrap();
                    loop {
                        std::thread::park();
                    }
                });
                reply(id.recv().unwrap().as_bytes());
            }
            // The main thread alone ends.
            "leave" => crate::dying::leave_alone(number as i32),
            // Another program in this process.
            "become" => {
                let error = std::os::unix::process::CommandExt::exec(Command::new("sleep").arg("1000"));
                eprintln!("{error}");
            }
            // Nonsense into the mutex that the keeper watches.
            "spoil" => {
                crate::dying::spoil(number as u32);
                reply(me.as_bytes());
            }
            // A program of its own that outlives the call; its pid is the reply.
            "start" => {
                let child = Command::new("sleep").arg("1000").spawn().unwrap();
                reply(child.id().to_string().as_bytes());
            }
            // One that leaves the worker's session and its parent, as a daemon does.
            "daemon" => {
                let out = Command::new("setsid").args(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"]).output();
                reply(String::from_utf8_lossy(&out.unwrap().stdout).trim().as_bytes());
            }
            // `link FROM TO CHANNEL MESSAGES [SECONDS]`
            "link" => {
                let told = crate::links::at_worker(&worker, &text).unwrap_or_else(|error| format!("error: {error}"));
                reply(told.as_bytes());
            }
            "link_twice" => {
                let told = crate::links::twice(&worker, &text).unwrap_or_else(|error| format!("error: {error}"));
                reply(told.as_bytes());
            }
            "link_crossed" => {
                let told = crate::links::out_of_step(&worker, &text).unwrap_or_else(|error| format!("error: {error}"));
                reply(told.as_bytes());
            }
            "cwd" => {
                reply(std::env::current_dir().unwrap().to_string_lossy().as_bytes());
            }
            _ => {
                reply(rest);
            }
        }
        let _ = std::io::stdout().flush();
    }
}
