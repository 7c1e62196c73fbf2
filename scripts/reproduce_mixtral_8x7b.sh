#!/usr/bin/env bash
# Mixtral-8x7B on WikiText-2, at the sizes of the presets that llama.cpp's table has.
MODEL=mistralai/Mixtral-8x7B-v0.1
CONFIG=mixtral_8x7b.json
BITS=2.34,2.96,3.14
PLAN_BITS=2.96
CTX=2048
PUBLISHED="  MC-MoE (arXiv:2410.06270)   FP 3.84; PMQ, nominal 2.54 bits (about 2.8 to 2.9 bits per weight with scales)   5.09
  EAC-MoE (arXiv:2508.01625)  QESC at the same                                                                  4.54
  llama.cpp, context 512      FP 4.105; IQ2_XS, 2.34 bits per weight  5.275; Q2_K, 2.96  5.058; IQ3_XXS, 3.14  4.457"
source "$(dirname "$0")/reproduce.sh" "$@"
