# What cluster/haproxy changes in the configuration that Ray 2.60 writes: each line is needed, which a test of
# tests/cluster/test_haproxy.py proves on Ray's own template.

# Metrics and statistics page: on loopback. The admin socket: for this user.
s/^( *bind )\*?:([0-9]+) *$/\1127.0.0.1:\2/
s/^( *stats socket .*) mode 666 /\1 mode 600 /

# The applications' names are told to nobody.
s/^( *http-request return) .* if routes *$/\1 status 404 if routes/

# A request id that is free text may hold a name, and Serve answers with what it gets. Elsewhere: serve_app/http/problems.py.
s/^frontend http_frontend *$/&\n    http-request del-header X-Request-ID if { req.fhdr_cnt(x-request-id) gt 1 } or !{ req.fhdr(x-request-id) -m reg ^[A-Za-z0-9._-]{1,64}$ }/

# HAProxy's own 400 has no setting: headers somewhat too many go on to the service, which has words for it (those
# somewhat too large as well, by RAY_SERVE_HAPROXY_TUNE_BUFSIZE).
s/^( *)tune\.bufsize .*/&\n\1tune.http.maxhdr 1000/

# An answer that no replica gave, because it died with the request or none is up: Ray's is "500 Internal Server
# Error" in plain text. It is a problem document like every other, and says that the request may be sent again.
s|^( *)errorfile 502 .*|\1unique-id-format %[uuid()]\n\1http-error status 502 content-type application/problem+json hdr Retry-After 2 hdr X-Request-ID %[unique-id] lf-string '{"type":"urn:derm-cds:problem:interrupted","title":"Bad Gateway","status":502,"code":"interrupted","detail":"The request was interrupted; whether it was carried out is not known. Send it again with the same Idempotency-Key.","request_id":"%[unique-id]"}'|
s|^( *)errorfile 503 .*|\1http-error status 503 content-type application/problem+json hdr Retry-After 5 hdr X-Request-ID %[unique-id] lf-string '{"type":"urn:derm-cds:problem:unavailable","title":"Service Unavailable","status":503,"code":"unavailable","detail":"The service does not take requests at the moment; nothing was stored, try again.","request_id":"%[unique-id]"}'|
s|^( *)errorfile 504 .*|\1http-error status 504 content-type application/problem+json hdr Retry-After 5 hdr X-Request-ID %[unique-id] lf-string '{"type":"urn:derm-cds:problem:interrupted","title":"Gateway Timeout","status":504,"code":"interrupted","detail":"No answer came in time; whether the request was carried out is not known. Send it again with the same Idempotency-Key.","request_id":"%[unique-id]"}'|

# The same where Serve's own proxy, HAProxy's fallback, loses the replica: our service never says 500 in plain text.
s|^frontend http_frontend *(\n.*)?$|&\n    http-response return status 502 content-type application/problem+json hdr Retry-After 2 hdr X-Request-ID %[unique-id] lf-string '{"type":"urn:derm-cds:problem:interrupted","title":"Bad Gateway","status":502,"code":"interrupted","detail":"The request was interrupted; whether it was carried out is not known. Send it again with the same Idempotency-Key.","request_id":"%[unique-id]"}' if { status 500 } { res.hdr(content-type) -m beg text/plain }|
