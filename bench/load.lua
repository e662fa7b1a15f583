-- What wrk sends. LOAD is "get", "login" or "refresh"; tokens for refreshing come from the file TOKENS, one a line, and
-- each answer gives the next one, so that every request presents a token that nobody has presented before.

local load = os.getenv("LOAD")
local headers = { ["Content-Type"] = "application/json", ["X-Forwarded-Proto"] = "https", ["X-Forwarded-For"] = "192.0.2.7" }
if os.getenv("CREDENTIAL") then
  headers["Authorization"] = "Bearer " .. os.getenv("CREDENTIAL")
end
local spare, first, last = {}, 1, 0

function init()
  if load == "refresh" then
    for line in io.lines(os.getenv("TOKENS")) do
      last = last + 1
      spare[last] = line
    end
  end
end

function request()
  if load == "get" then
    return wrk.format("GET", os.getenv("TARGET"), headers)
  elseif load == "login" then
    return wrk.format("POST", nil, headers, os.getenv("BODY"))
  end
  local token = spare[first]
  spare[first] = nil
  first = first + 1
  return wrk.format("POST", nil, headers, '{"refreshToken":"' .. token .. '"}')
end

function response(status, _, body)
  if load == "refresh" then
    last = last + 1
    spare[last] = string.match(body, '"refreshToken":"([^"]+)"')
  end
end

function done(summary, latency, _)
  local refused = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format("RESULT %d %d %d %d %d\n",
    summary.requests, summary.duration, refused, latency:percentile(50), latency:percentile(99)))
end
