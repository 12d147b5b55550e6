-- What bench/compare reads of a run.
done = function(s, latency, requests)
  local e = s.errors
  io.write(string.format('\nJSON {"requests":%d,"us":%d,"errors":%d,"p99":%d}\n', s.requests, s.duration,
    e.connect + e.read + e.write + e.timeout + e.status, latency:percentile(99)))
end
