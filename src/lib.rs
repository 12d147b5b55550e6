pub mod balance;
pub mod config;
pub mod resolve;
pub mod tls;
