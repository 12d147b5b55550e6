//! Room for the futures of a connection's streams.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::ReusableBoxFuture;

/// How many a connection keeps while it is in use.
const KEPT: usize = 16;

/// Allocations that ended streams have left. A stream's future takes several KiB, which malloc is slow to
/// allocate and free.
#[derive(Clone, Default)]
pub struct Rooms(Arc<Mutex<Vec<ReusableBoxFuture<'static, ()>>>>);

impl Rooms {
    /// Runs a stream as a task.
    pub fn spawn<F>(&self, stream: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let left = self.0.lock().pop();
        let mut room = match left {
            Some(mut room) => {
                room.set(stream);
                room
            }
            None => ReusableBoxFuture::new(stream),
        };
        let rooms = self.clone();
        tokio::spawn(async move {
            (&mut room).await;
            let mut rooms = rooms.0.lock();
            if rooms.len() < KEPT {
                rooms.push(room);
            }
        });
    }

    /// Frees them.
    pub fn rest(&self) {
        *self.0.lock() = Vec::new();
    }
}
