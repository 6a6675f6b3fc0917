#!/bin/sh
# Ask a running server without a package: `mlxarch serve MODEL`, then
#   sh client_curl.sh "Why is the sky blue?" http://127.0.0.1:8000
text=${1:-Why is the sky blue?}
url=${2:-http://127.0.0.1:8000}
set -e

# an answer as it is written: a line "data: {…}" for each part
curl -sN "$url/v1/chat/completions" -H "Content-Type: application/json" -d '{
  "messages": [{"role": "user", "content": "'"$text"'"}], "max_tokens": 50, "stream": true}'

# an answer in the form of a JSON schema, whole
curl -s "$url/v1/chat/completions" -H "Content-Type: application/json" -d '{
  "messages": [{"role": "user", "content": "'"$text"'"}], "max_tokens": 100,
  "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {
    "type": "object", "properties": {"question": {"type": "boolean"}}, "required": ["question"]}}}}'
echo
curl -s "$url/metrics" | grep generation_tokens_total
