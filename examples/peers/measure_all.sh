#!/bin/bash
# Quantizes a model with this project and with its peers, and measures all.
#
#     bash examples/peers/measure_all.sh smollm FOLDER [ORIGINAL.gguf]
#     bash examples/peers/measure_all.sh stories FOLDER [ORIGINAL.gguf]
#
# FOLDER gets made/, own/ and outputs/; table.py reads them.  What is made and measured is left as
# it is, so a second call goes on.  Without the GGUF file, llama.cpp's types are left out; `as_gguf.py` writes
# one.  `smollm` is the default model.  `stories` is a folder: set MODEL, and TEXT and HELD_OUT to
# two texts like those that it was trained on.  PYTHON runs the peers, if they live elsewhere.
# ONLY="hqq3 IQ4_NL" makes and measures these alone.
set -u
here=$(cd "$(dirname "$0")" && pwd)
[ -n "${MODEL:-}" ] && MODEL=$(realpath "$MODEL") TEXT=$(realpath "$TEXT") HELD_OUT=$(realpath "$HELD_OUT")
which=$1 folder=$2 gguf=${3:+$(realpath "$3")} python=${PYTHON:-python}
mkdir -p "$folder/made" && cd "$folder" || exit 1
case $which in
  smollm)
    model="model=smollm2_135m" calibration="calibration.windows=16" group=64
    evaluation="evaluation=perplexity" ;;
  stories)
    model="model=hf model.source=$MODEL" group=96
    calibration="calibration=text calibration.path=$TEXT calibration.windows=128 calibration.seqlen=256"
    evaluation="evaluation=none +corpus@evaluation.corpora.held_out=text evaluation.context=256 evaluation.kl_windows=32"
    evaluation+=" evaluation.corpora.held_out.path=$HELD_OUT evaluation.corpora.held_out.windows=64" ;;
  *) echo "smollm or stories" >&2; exit 2 ;;
esac

left_out() { [[ -n ${ONLY:-} && " $ONLY " != *" $1 "* ]]; } # NAME
done_with() { [ -e "made/$1.measured" ] || left_out "$1"; } # NAME
is_made() { grep -qs "^$1," made/costs.csv; }        # NAME; measured.py writes it last
measure() { # NAME CHECKPOINT
  "$python" -m claq_exp evaluate checkpoint="$2" $model $evaluation threads=1 name=peers > "made/$1.evaluated" 2>&1 &&
    touch "made/$1.measured" ||
    echo "$1 was not measured: made/$1.evaluated" >&2
}
own() { # NAME WORDS
  local name=$1; shift
  done_with "$name" && return
  is_made "$name" || "$python" "$here/measured.py" "$name" "$python" -m claq_exp "$@" $model $calibration \
    evaluation=none tracking=none threads=1 outputs=own name="$name" > "made/$name.made" 2>&1 ||
    { echo "$name was not made: made/$name.made" >&2; return; }
  measure "$name" own/"$name"/*/checkpoint
}
peer() { # NAME SCRIPT OPTIONS
  local name=$1 script=$2; shift 2
  done_with "$name" && return
  if ! is_made "$name"; then
    rm -rf "made/$name"
    "$python" "$here/measured.py" "$name" "$python" "$here/$script" "made/$name" "$@" $model $calibration \
      > "made/$name.made" 2>&1 || { echo "$name was not made: made/$name.made" >&2; return; }
  fi
  measure "$name" "$(dirname "$(ls made/"$name"/config.json made/"$name"/*/config.json 2> /dev/null)")"
}
llama() { # TYPE
  { [ -z "$gguf" ] || done_with "$1"; } && return
  if ! is_made "$1"; then
    rm -f "made/$1.gguf"
    "$python" "$here/measured.py" "$1" "$python" "$here/with_llama_cpp.py" "$gguf" "made/$1.gguf" "$1" $model \
      $calibration > "made/$1.made" 2>&1 || { echo "$1 was not made: made/$1.made" >&2; return; }
  fi
  measure "$1" "made/$1.gguf"
}

export OMP_NUM_THREADS=1
light="--iterations 50 --rate 5e-3"
own rd2.2 experiment=linear/rate_distortion_2.3 budget.bits=2.2
own rd2.3 experiment=linear/rate_distortion_2.3
own rd3.3 experiment=linear/rate_distortion_3.3
own rd4.5 experiment=linear/rate_distortion_3.3 budget.bits=4.5
own free2.2 experiment=best/free_2.3 budget.bits=2.2
own free2.3 experiment=best/free_2.3
own free3.3 experiment=best/free_3.3
own free4.0 experiment=best/free_4.0
own free4.5 experiment=best/free_4bit
own kmeans4 experiment=kmeans_4bit
own default
llama IQ4_NL
for bits in 3 4; do
  peer hqq$bits with_hqq.py --bits $bits
  peer llmc$bits with_llm_compressor.py --bits $bits --group-size $group
done
peer ar2ext with_auto_round.py --bits 2 --group-size $group $light --alg-ext
for bits in 2 3 4; do peer ar$bits with_auto_round.py --bits $bits --group-size $group $light; done
peer ar2ext-200 with_auto_round.py --bits 2 --group-size $group --iterations 200 --batch-size 8 --alg-ext
peer ar2-200 with_auto_round.py --bits 2 --group-size $group --iterations 200 --batch-size 8
for type in IQ2_M IQ3_XXS Q4_K_M; do llama $type; done
