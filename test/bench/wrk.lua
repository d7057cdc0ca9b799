-- What ask in load_test.go gives wrk: each thread asks one service. Requests are prepared before the load begins; a single
-- one costs no Lua.
local service = os.getenv("SERVICES"):gmatch("(%S+):(%d+)")
function setup(thread) thread.addr = wrk.lookup(service())[1] end
local requests, next = {}, 0
function init(args)
	for line in io.lines(args[1]) do
		local method, path, body = line:match("^(%S+) (%S+) ?(.*)$")
		wrk.method, wrk.path, wrk.body = method, path, body ~= "" and body or nil
		requests[#requests + 1] = wrk.format()
	end
	if #requests == 1 then return end
	function request()
		next = next % #requests + 1
		return requests[next]
	end
end
function done(summary, latency)
	local e = summary.errors
	io.write(string.format("RESULT %d %d %d %d %d %d\n", summary.requests, summary.duration,
		latency:percentile(50), latency:percentile(99), e.status, e.connect + e.read + e.write + e.timeout))
end
