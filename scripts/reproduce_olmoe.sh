#!/usr/bin/env bash
# OLMoE-1B-7B on WikiText-2.
MODEL=allenai/OLMoE-1B-7B-0924
CONFIG=olmoe.json
BITS=2.3,2.54,3.03
PLAN_BITS=2.54
CTX=2048
PUBLISHED="  none that we know of"
source "$(dirname "$0")/reproduce.sh" "$@"
