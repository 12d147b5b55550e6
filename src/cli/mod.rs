//! The commands, each in its own file.

pub mod ca;
pub mod check;
pub mod demo;
pub mod exec;
pub mod run;
pub mod schema;
mod signals;
pub mod wait;

use std::{
    env,
    io::{self, IsTerminal, Write},
    panic,
    path::PathBuf,
    process::{self, ExitCode},
    time::Duration,
};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, builder::Resettable};
use tokio::runtime;

use crate::{folder, telemetry};

/// A check or a request failed.
const EXIT_FAILED: u8 = 1;
/// Wrong usage, or an unusable configuration.
const EXIT_USAGE: u8 = 2;
/// An internal error (sysexits' `EX_SOFTWARE`).
const EXIT_INTERNAL: u8 = 70;

/// How long the process waits at its end for the last lines to be read.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The `truename` command.
pub fn main() -> ExitCode {
    if cfg!(panic = "abort") {
        panic::set_hook(Box::new(|panic| {
            telemetry::say(format_args!("truename: internal error: {panic}"));
            end();
            process::exit(EXIT_INTERNAL.into());
        }));
    }
    let code = match exec::WithHosts::given(env::args_os().skip(1)) {
        Some(command) => command.run(),
        None => match Cli::parse_arguments() {
            Ok(cli) => cli.run(),
            Err(error) => show(&error),
        },
    };
    end();
    code
}

/// Cleans up. Every exit of the process must call this.
fn end() {
    folder::remove_all();
    telemetry::flush(LAST_LINES);
}

/// A TLS-aware sidecar proxy: an alias in, its verified true name out.
#[derive(Debug, Parser)]
#[command(name = "truename", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Run),
    Exec(exec::Exec),
    /// Check a configuration file and report every problem in it
    Check {
        /// The configuration file
        #[arg(long, value_name = "FILE", env = "TRUENAME_CONFIG")]
        config: PathBuf,
    },
    /// Show the whole thing on this machine, offline: cluster DNS, TLS servers and the proxy
    Demo(demo::Demo),
    Wait(wait::Wait),
    /// Manage the local certificate authorities for applications that speak TLS
    #[command(subcommand)]
    Ca(ca::Ca),
    /// Print the JSON Schema of the configuration
    Schema,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

impl Cli {
    /// Parses arguments and variables. An error may also be a request for help.
    fn parse_arguments() -> Result<Self, clap::Error> {
        let matches = without_empty_variables(Self::command()).try_get_matches()?;
        Self::from_arg_matches(&matches)
    }

    /// Runs the command.
    pub fn run(self) -> ExitCode {
        match self.command {
            Command::Run(run) => run.run(),
            Command::Exec(exec) => exec.run(),
            Command::Check { config } => print(|out| check::run(&config, out)),
            Command::Demo(demo) => demo.run(),
            Command::Wait(wait) => wait.run(),
            Command::Ca(ca) => print(|out| ca.run(out)),
            Command::Schema => print(|out| schema::run(out).map(|()| 0)),
            Command::Completions { shell } => print(|out| {
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "truename", &mut text);
                out.write_all(&text).map(|()| 0)
            }),
        }
    }
}

/// Treats empty variables as unset, because manifests and unit files often contain them.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty =
        |arg: &clap::Arg| arg.get_env().and_then(env::var_os).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| if is_empty(&arg) { arg.env(Resettable::Reset) } else { arg })
        .mut_subcommands(without_empty_variables)
}

/// Prints help or an error in the arguments, and returns the exit code. `clap` itself would block if stderr
/// is not read, and would ignore errors of stdout.
fn show(error: &clap::Error) -> ExitCode {
    let text = error.render();
    let shown = |terminal: &dyn Fn() -> bool| match telemetry::is_coloured(terminal()) {
        true => text.ansi().to_string(),
        false => text.to_string(),
    };
    let code = u8::try_from(error.exit_code()).unwrap_or(EXIT_USAGE);
    if error.use_stderr() {
        telemetry::say(shown(&|| io::stderr().is_terminal()).trim_end());
        return ExitCode::from(code);
    }
    print(|out| out.write_all(shown(&|| io::stdout().is_terminal()).as_bytes()).map(|()| code))
}

/// Runs a command on its own runtime. The exit does not wait for files that hang.
fn block_on(command: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            telemetry::say(format_args!("truename: cannot start: {error}"));
            return ExitCode::from(EXIT_INTERNAL);
        }
    };
    let code = runtime.block_on(command);
    runtime.shutdown_background();
    code
}

/// Runs a command that writes to stdout. It is no error if the reader closes stdout early.
fn print(command: impl FnOnce(&mut io::StdoutLock<'static>) -> io::Result<u8>) -> ExitCode {
    let mut out = io::stdout().lock();
    let result = command(&mut out).and_then(|code| out.flush().map(|()| code));
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::say(format_args!("truename: cannot write to standard output: {error}"));
            ExitCode::from(EXIT_FAILED)
        }
    }
}
