#!/usr/bin/env bash
# The API with curl: requests.sh [URL]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
post() {  # PATH BODY
  curl -sSN --fail-with-body "$url$1" -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
    -H "Content-Type: application/json" -d "$2"
  echo
}
post /v1/chat/completions '{"messages": [{"role": "user", "content": "What is a loop?"}], "max_tokens": 32}'
post /v1/chat/completions '{"messages": [{"role": "user", "content": "Count."}], "max_tokens": 8, "stream": true}'
post /v1/completions '{"prompt": "def area(radius):", "max_tokens": 32, "temperature": 0}'
post /tokenize '{"prompt": "def area(radius):"}'
