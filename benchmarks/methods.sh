#!/bin/sh
# Every method on one model, in one record and one table; run it again and it goes on where it was.
#
#   benchmarks/methods.sh MODEL RECORD.json [options of `mxtorq compare`: --seeds, --text, ...]
#
# Models whose widths 128 does not divide, or whose heads 32 does not, name other block sizes:
#   DUQUANT=duquant:block=32 BRQ=brq:size=16 benchmarks/methods.sh ...
set -eu
model=$1 record=$2
shift 2
duquant=${DUQUANT:-duquant} brq=${BRQ:-brq}

add() {
    mxtorq compare "$model" --json "$record" --resume --markdown "${record%.json}.md" "$@"
}

# Every method with both roundings, in the strict format.
add --methods "identity,hadamard,torq,duquant++,$duquant,smoothquant,perq,quarot,$brq,wush,hires" \
    --roundings rtn,gptq "$@"
# SpinQuant learns against unrounded weights, for GPTQ to round.
add --methods spinquant --roundings gptq "$@"
# What papers do otherwise: WUSH from the last block, MR-GPTQ's static scales and order.
add --methods wush,wush:curvature=conditional --roundings gptq:order=backward "$@"
add --methods hadamard --roundings gptq:scales=static:order=descending "$@"
# Ablations of TORQ and DuQuant++, the other legal scale rules, and the better of three exponents a block.
add --methods torq:levels=inter,torq:levels=intra,duquant++:smooth=false --roundings gptq "$@"
add --methods identity,hadamard,wush --roundings gptq --scale-rules even,rceil,uos "$@"
add --methods identity,hadamard,wush --roundings rtn:exponents=3,gptq:exponents=3 "$@"
# Scales that no hardware has, and what they do to the same methods.
add --methods 'identity,hadamard,duquant++' --roundings rtn,gptq \
    --scale-rules log256,four-thirds "$@"
