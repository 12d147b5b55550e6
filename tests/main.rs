//! Whole-proxy tests: the real binary, over real sockets. One file a capability, and one program for all
//! of them, as each program that links the library costs every edit of it a second.
//!
//! A new file needs its line here.

// Helpers are part of the tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod admin;
mod authority;
mod authority_clients;
mod balance;
mod brokers;
mod certificates;
mod clients;
mod commands;
mod connection_limit;
mod connections;
mod continuity;
mod cuts;
mod demo;
mod dns;
mod embed;
mod ending;
mod ends;
mod errors;
mod examples;
mod exec;
mod exec_hosts;
mod exec_terminal;
mod expect;
mod failover;
mod forward_proxy;
mod fuzz;
mod headers;
mod http;
mod http2;
mod http2_clients;
mod http2_floods;
mod http2_origin_floods;
mod http2_upstream;
mod life;
mod listener_certificate;
mod listener_tls;
mod listeners;
mod mail_servers;
mod mariadb;
mod metrics;
mod moves;
mod mysql;
mod mysql_ends;
mod names;
mod origins;
mod pool;
mod postgres;
mod postgres_ends;
mod postgres_real;
mod proxy_credentials;
mod proxy_protocol;
mod reload;
mod reuse;
mod rotation;
mod stalls;
mod starttls;
mod streaming;
mod streams;
mod support;
mod support_world;
mod syscalls;
mod tcp;
mod tcp_connecting;
mod tcp_hello;
mod tls_servers;
mod tls_upstream;
mod upgrade;
mod via;
mod wait;
