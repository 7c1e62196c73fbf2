#!/usr/bin/env bash
# DeepSeek-V2-Lite on WikiText-2. Its experts' 1408 columns are no multiple of 256: fewest bits 2.66.
MODEL=deepseek-ai/DeepSeek-V2-Lite
CONFIG=deepseek_v2_lite.json
BITS=3.03,3.5,4.25
PLAN_BITS=3.03
CTX=2048
PUBLISHED="  none that we know of"
source "$(dirname "$0")/reproduce.sh" "$@"
