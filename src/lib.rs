pub mod config;
pub mod resolve;
