//! How values are written in the file.
