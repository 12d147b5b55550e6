//! The `truename` command.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    truename::cli::Cli::parse().run()
}
