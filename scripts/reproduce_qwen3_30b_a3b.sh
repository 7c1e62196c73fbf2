#!/usr/bin/env bash
# Qwen3-30B-A3B on WikiText-2.
MODEL=Qwen/Qwen3-30B-A3B
CONFIG=qwen3_30b_a3b.json
BITS=2.3,2.54,3.03
PLAN_BITS=2.54
CTX=2048
PUBLISHED="  no perplexity that we know of; AutoRound's q2_k_s: mean accuracy 0.6386 rounded to nearest, 0.6460 tuned (BF16 0.6746)"
source "$(dirname "$0")/reproduce.sh" "$@"
