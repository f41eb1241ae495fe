# What cluster/haproxy changes in the configuration that Ray 2.60 writes: each line is needed, which a test of
# tests/cluster/test_haproxy.py proves on Ray's own template.

# Metrics and statistics page: on loopback. The admin socket: for this user.
s/^( *bind )\*?:([0-9]+) *$/\1127.0.0.1:\2/
s/^( *stats socket .*) mode 666 /\1 mode 600 /

# Who is calling, for serve_app/http/ingress.py, whatever the caller says; and nothing but HTTP. What the replica's HTTP
# parser refuses, a method that nobody knows, it refuses in plain text. A header that trickles in holds a place, of
# 4,096, for 10 s at most.
s/^frontend http_frontend *$/&\n    timeout http-request 10s\n    timeout http-keep-alive 60s\n    http-request set-header X-Derm-Peer %[src]\n    http-request del-header Upgrade\n    http-response return status 400 default-errorfiles if { status 400 } { res.hdr(content-type) -m beg text\/plain }/

# HAProxy's own 400 for what is not HTTP has no setting: headers somewhat too many go on to the service, which has
# words for it (those somewhat too large as well, by RAY_SERVE_HAPROXY_TUNE_BUFSIZE).
s/^( *)tune\.bufsize .*/&\n\1tune.http.maxhdr 1000/

# The applications' names are told to nobody. Without any there is no service, and not "Path '...' not found".
s/^( *http-request return) .* if routes *$/\1 status 404 default-errorfiles if routes/
s/^( *http-request return) status 404 content-type .* not found\..*/\1 status 503 default-errorfiles/
s/^( *http-request return) status 503 content-type text\/plain string "[^"]*"/\1 status 503 default-errorfiles/

# An answer that no replica gave, because it died with the request or none is up: Ray's is "500 Internal Server
# Error" in plain text. It is a problem document like every other, and says that the request may be sent again.
s|^( *)errorfile 502 .*|\1unique-id-format %[uuid()]\n\1problem 400 bad_request "Bad Request" "The request could not be read."\n\1problem 404 not_found "Not Found" "There is nothing here."\n\1problem 502 interrupted hdr Retry-After 2 "Bad Gateway" "The request was interrupted; whether it was carried out is not known. Send it again with the same Idempotency-Key."|
s|^( *)errorfile 503 .*|\1problem 503 unavailable hdr Retry-After 5 "Service Unavailable" "The service does not take requests at the moment; nothing was stored, try again."|
s|^( *)errorfile 504 .*|\1problem 504 interrupted hdr Retry-After 5 "Gateway Timeout" "No answer came in time; whether the request was carried out is not known. Send it again with the same Idempotency-Key."|
s|problem ([0-9]+) ([a-z_]+) (hdr Retry-After [0-9]+ )?("[^"]*") ("[^"]*")|http-error status \1 content-type application/problem+json \3hdr X-Request-ID %[unique-id] lf-string '{"type":"urn:derm-cds:problem:\2","title":\4,"status":\1,"code":"\2","detail":\5,"request_id":"%[unique-id]"}'|g
