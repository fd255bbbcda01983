#!/bin/bash
# parallel.sh [CLIPS] - docs/many.md's command for GNU parallel, killed in the middle with all its processes and given again:
# every clip must be there, with the bytes of a single run.
set -eu
clips=${1:-8}
cd "$(dirname "$0")/.."
model=$PWD/models/demo.gguf work=$(mktemp -d /tmp/sora-parallel.XXXXXX)
trap 'rm -rf "$work"' EXIT
cp sora "$work"
cd "$work"
export SORA_STATE_SECONDS=0 # clips are short
options="-q -t 1 -s 48x48 -f 17"
for i in $(seq "$clips"); do
    echo "it's a \"red\" star, number $i: \$HOME"
done >prompts.txt
for i in $(seq "$clips"); do
    ./sora -m "$model" $options --seed "$i" -o "single-$i.y4m" -p "$(sed -n "${i}p" prompts.txt)"
done

cat >many.sh <<end
parallel --jobs 2 --joblog clips.log --resume-failed \\
    '[ -e clip-{#}.y4m ] || if [ -e clip-{#}.y4m.state ]; then ./sora --resume -q -t 1 -o clip-{#}.y4m;
     else ./sora -m $model $options --seed {#} -o clip-{#}.y4m -p {}; fi' :::: prompts.txt
end
setsid bash many.sh 2>parallel.err & session=$!
until [ -e clip-3.y4m.state ]; do sleep 0.05; done
ps -o pid= -s "$session" | xargs kill -KILL
wait "$session" || :
states=$(ls -- *.state | wc -l)
bash many.sh 2>>parallel.err
for i in $(seq "$clips"); do
    cmp "single-$i.y4m" "clip-$i.y4m"
    cmp "single-$i.y4m.json" "clip-$i.y4m.json"
done
[ -z "$(find . -name '*.state*' -o -name '*.part')" ]
echo "$clips clips, all with the bytes of a single run; $states were resumed after everything was killed"
