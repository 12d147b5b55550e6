//! The `truename` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    truename::cli::main()
}
