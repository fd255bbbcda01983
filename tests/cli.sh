#!/bin/sh
# cli.sh SORA FOLDER - tests the command line: exit statuses, error messages of one line, files that remain, clips
# compared with diffusers. Prints "ok ..." or "FAILED ..." for each claim; test_cli.c counts them. FOLDER holds the
# damaged weight files that test_cli.c writes.
sora=$1
work=$2
golden=tests/goldens/model
model=$golden/model.gguf
settings="-s 32x16 -f 5 --steps 2 -g 3 --shift 3 --sampler unipc --seed 7"
small="-m $model $settings"

claim() { # claim NAME COMMAND...: the claim holds if the command succeeds
    name=$1
    shift
    if "$@" >/dev/null 2>&1; then echo "ok $name"; else echo "FAILED $name: $*; $(head -c 300 "$work/err" | tr '\n' '|')"; fi
}

run() { # run ARGUMENTS...: runs sora; sets $status, writes $work/out and $work/err
    rm -f "$work"/clip* "$work/out" "$work/err"
    "$sora" "$@" >"$work/out" 2>"$work/err" </dev/null
    status=$?
}

# refused STATUS TEXT ARGUMENTS...: sora must exit with STATUS, print exactly one line, which holds TEXT, and leave no
# output file.
refused() {
    expected=$1 text=$2
    shift 2
    run -o "$work/clip.y4m" --seed 1 "$@"
    claim "$*: status $expected, not $status" [ "$status" = "$expected" ]
    claim "$*: one line" [ "$(wc -l <"$work/err")" -eq 1 ]
    claim "$*: '$text'" grep -q "^sora: .*$text" "$work/err"
    claim "$*: nothing left" [ -z "$(ls "$work" | grep clip)" ]
}

usage() {
    refused 2 "unknown option '--frames-per-second'" --frames-per-second 3 x
    refused 2 "unknown option '-z'" -z x
    refused 2 "--quiet takes no value" --quiet=1 x
    refused 2 "--size: WxH is missing" -m $model x --size
    refused 2 "two prompts: 'a' and 'b', expected one, in quotes if it has spaces$" -m $model a b
    refused 2 "no prompt" -m $model
    refused 2 "--size: width is 33, expected a multiple of 8, such as 32 or 40$" -m $model --size 33x16 x
    refused 2 "--size: height is 20, expected a multiple of 8, such as 16 or 24$" -m $model --size=32x20 x
    refused 2 "--size: height is 7, expected a multiple of 8$" -m $model --size 32x7 x
    for size in 32x0 32x 32 x32 32x32x32 -32x32 99999x32; do
        refused 2 "--size: '$size' is not WxH" -m $model --size "$size" x
    done
    refused 2 "--frames: 4 is not a multiple of 4 plus 1, such as 1 or 5$" -m $model --frames 4 x
    refused 2 "--frames: 80 is not a multiple of 4 plus 1, such as 77 or 81$" -m $model --frames 80 x
    refused 2 "'1e3' is not a whole number" -m $model --frames 1e3 x
    refused 2 "--seconds: 'nan'" -m $model --seconds nan x
    for rate in 0 0:1 24: 24:0 24:1:1 -24 .5 1e3 1000001 1.0000001 fast ""; do
        refused 2 "--fps: '$rate' is not a rate such as 24, 23.976, 30000/1001 or 30000:1001" -m $model --fps "$rate" x
    done
    refused 2 "--steps: '0'" -m $model --steps 0 x
    refused 2 "--guidance: 'inf'" -m $model -g inf x
    refused 2 "--shift: '0'" -m $model --shift 0 x
    refused 2 "--sampler: 'heun' is not unipc, euler or dpm++" -m $model --sampler heun x
    for seed in -9223372036854775809 18446744073709551616 1.5 - 7x ""; do
        refused 2 "--seed: '$seed' is not a whole number from -2^63 to 2^64-1" -m $model --seed "$seed" x
    done
    refused 2 "--output a.b/clip.MP4: .* for mp4 give -o a.b/clip.y4m, then: ffmpeg -i a.b/clip.y4m a.b/clip.MP4$" \
        -m $model -o a.b/clip.MP4 x
    for name in webm gif mkv mov png; do
        refused 2 "for $name give -o clip.y4m, then: ffmpeg -i clip.y4m clip.$name$" -m $model -o clip.$name x
    done
    refused 2 "--output $work/some.npy: the video is written as Y4M, expected another name" -m $model -o "$work/some.npy" x
    refused 2 "--threads: '0'" -m $model -t 0 x
    refused 2 "--precision: 'f31'" -m $model --precision f31 x
    refused 2 "--isa: 'pentium'" -m $model --isa pentium x
    refused 2 "--chroma: '411'" -m $model --chroma 411 x
    refused 2 "--tolerance: 'x'" -m $model --tolerance x x
    refused 2 "with --frames 1000001 is 4.19e+12 latent positions, expected less than 2^31" -m $model --size 16384x16384 --frames 1000001 x
    refused 2 "--steps 1000 with --shift 1000: sigma does not decrease in step 1," -m $model --steps 1000 --shift 1000 x
}

input() {
    refused 2 "nowhere.gguf: No such file" -m nowhere.gguf x
    refused 2 "$work: this is a folder: convert it with export.py" -m "$work" x
    printf '\020\0\0\0\0\0\0\0{"a":{"shape":[]}}' >"$work/foreign"
    refused 2 "foreign: this is a safetensors file: convert it with export.py" -m "$work/foreign" x
    printf 'PK\003\004 and so on' >"$work/foreign"
    refused 2 "foreign: this is a PyTorch file (.pth): convert it with export.py" -m "$work/foreign" x
    echo "version https://git-lfs.github.com/spec/v1" >"$work/foreign"
    refused 2 "foreign: this is a Git LFS pointer: git lfs pull fetches the file itself" -m "$work/foreign" x
    refused 2 "foreign.gguf: a GGUF file of another program (general.architecture is \"llama\"), expected one that export.py wrote" \
        -m tests/goldens/weights/foreign.gguf x
    refused 2 "empty.gguf: the file is empty" -m "$work/empty.gguf" x
    refused 2 "not a GGUF file" -m Makefile x
    refused 2 "cut.gguf: tensor .* the file is cut off" -m "$work/cut.gguf" x
    refused 2 "header.gguf: 213 tensors and 72 keys do not fit" -m "$work/header.gguf" x
    refused 2 "missing.gguf: tensor \"blocks.1.ffn.2.weight\" is missing" -m "$work/missing.gguf" x
    refused 2 "shape.gguf: tensor .* has shape .*, expected" -m "$work/shape.gguf" x
    refused 2 "tokenizer.gguf: .*tokenizer" -m "$work/tokenizer.gguf" x
    refused 2 "version.gguf: sora.format_version is 0, expected 1" -m "$work/version.gguf" x
    refused 2 "fp16.gguf: default.precision is 'fp16', expected f32, bf16 or int8" -m "$work/fp16.gguf" x
    refused 2 "layout.gguf: vae.conv_layout is N,T,Y,X,I, expected O,T,Y,X,I" -m "$work/layout.gguf" x
    refused 2 "--noise nowhere.npy: No such file" $small --noise nowhere.npy x
    refused 2 "--noise tests/goldens/npy/f4_3.npy: shape \[3\], expected \[4, 2, 4, 8\]" $small --noise tests/goldens/npy/f4_3.npy x
    refused 2 "shape \[2, 4, 4, 8\], expected \[4, 2, 4, 8\]: its axes are in another order" \
        $small --noise tests/goldens/npy/noise_tchw.npy x
    refused 2 "not an .npy file" $small --noise Makefile x
    { head -c 128 $golden/noise.npy; printf '\0\0\300\177'; tail -c +133 $golden/noise.npy; } >"$work/nan.npy"
    refused 2 "nan.npy: value 1 of 256 is NaN or infinity" $small --noise "$work/nan.npy" x
    refused 2 "--prompt-file nowhere.txt: No such file" $small --prompt-file nowhere.txt
    printf 'a\0 \0f\0o\0x\0' >"$work/prompt.raw"
    refused 2 "prompt.raw: byte 1 is 0, expected text in UTF-8, or UTF-16 with a byte order mark" \
        $small --prompt-file "$work/prompt.raw"
    refused 2 "--check nowhere: No such file" $small --check nowhere x
    refused 2 "--check tests: the folder contains no .npy" $small --check tests x
    refused 2 "--dump-only: needs --dump DIR" $small --dump-only 'step*' x
    refused 2 "--tolerance: needs --check DIR" $small --tolerance 1 x
    refused 2 "--feed: needs --check DIR" $small --feed x
    refused 2 "--frames and --seconds" $small --seconds 1 x
    refused 2 "the name of an output file is empty" $small -o "" x
    cp tests/goldens/npy/f4_3.npy "$work/input.npy"
    ln "$work/input.npy" "$work/input.y4m"
    refused 2 "--output .*input.y4m: would overwrite the input file .*input.npy" $small --noise "$work/input.npy" -o "$work/input.y4m" x
    refused 2 "--output .*input.npy: the video is written as Y4M" $small --noise "$work/input.npy" -o "$work/input.npy" x
    echo x >"$work/input.y4m.json"
    refused 2 "--output .*input.y4m: would overwrite the input file .*input.y4m.json" $small --prompt-file "$work/input.y4m.json" -o "$work/input.y4m"
    refused 2 "--dump .*: could overwrite the input file .*input.npy" $small --noise "$work/input.npy" --dump "$work" x
    claim "an input file is not changed" cmp -s tests/goldens/npy/f4_3.npy "$work/input.npy"
}

resources() {
    refused 3 "nowhere/clip.y4m: cannot write: No such file" $small -o "$work/nowhere/clip.y4m" x
    refused 3 "cannot write: Is a directory" $small -o "$work" x
    mkdir "$work/taken.y4m.json"
    refused 3 "taken.y4m.json: cannot write: Is a directory" $small --steps 1000 -f 81 -o "$work/taken.y4m" x
    ln -s "$work/nowhere" "$work/link.y4m"
    refused 3 "link.y4m: a symbolic link that leads to no file: No such file or directory" $small -o "$work/link.y4m" x
    refused 3 "--dump $work/nowhere/below: No such file" $small --dump "$work/nowhere/below" x
    refused 3 "--size 4096x4096 with --frames 4001 needs .* GiB of memory, .* GiB are available" -m $model -s 4096x4096 -f 4001 x
    if [ -c /dev/full ]; then
        refused 3 "/dev/full: cannot write: No space left" $small -o /dev/full x
    fi
    # The stacks of 512 threads exceed this limit. It is skipped if sora cannot start under it (sanitizers).
    if (ulimit -v 300000 && "$sora" --version) >/dev/null 2>&1 && "$sora" --version | grep -q threads; then
        (ulimit -v 300000 && exec "$sora" $small -t 512 -o "$work/clip.y4m" x) >/dev/null 2>"$work/err"
        status=$?
        claim "512 threads exceed the memory limit: status 3, not $status" [ $status -eq 3 ]
        claim "512 threads exceed the memory limit: one line" grep -q "^sora: cannot start 512 threads, only [0-9]*: .* set a lower --threads" "$work/err"
    fi
}

# NaN or infinity must end the run at the first stage where it appears, with every precision.
not_finite() {
    for precision in f32 bf16 int8; do
        advice="NaN or infinity, expected finite values; try another --precision (this is $precision), --shift or --steps, or check"
        refused 1 "latents after step 1 of 2: $advice" -m "$work/infinite.gguf" $settings --precision $precision x
        refused 1 "latents after step 1 of 2: $advice" -m "$work/overflow.gguf" $settings --precision $precision x
        refused 1 "prompt.embeds: $advice" -m "$work/text.gguf" $settings --precision $precision x
        refused 1 "frame 1 of 5: $advice" -m "$work/decoder.gguf" $settings --precision $precision x
    done
}

meanwhile() { # meanwhile COMMAND OPTION...: starts sora with the options; runs COMMAND while sora (process $!) generates
    during=$1
    shift
    "$sora" "$@" -o "$work/clip.y4m" x 2>"$work/err" &
    for _ in $(seq 1000); do
        ls "$work" | grep -q "clip.y4m.*part" && break
        sleep 0.01
    done
    eval "$during"
    wait $!
    status=$?
}

# Pipes, redirections, closed streams, resource limits and signals.
streams() {
    (ulimit -f 4 && exec "$sora" $small -q -o "$work/clip.y4m" x) 2>"$work/err"
    status=$?
    claim "a limit on file sizes: status 3, not $status" [ $status -eq 3 ]
    claim "a limit on file sizes: its line" grep -q "clip.y4m: cannot write: File too large" "$work/err"
    claim "a limit on file sizes: nothing left" [ -z "$(ls "$work" | grep clip)" ]

    if [ -c /dev/full ]; then
        "$sora" $small -o - x 2>"$work/err" >/dev/full
        claim "a full disk behind standard output" grep -q "^sora: standard output: cannot write: No space" "$work/err"
    fi

    { "$sora" $small -f 81 -o - x 2>"$work/err"; echo $? >"$work/status"; } | head -c 10 >"$work/out"
    claim "a closed pipe: status 3, not $(cat "$work/status")" [ "$(cat "$work/status")" = 3 ]
    claim "a closed pipe: one line" [ "$(cat "$work/err")" = "sora: standard output: the reader closed the pipe" ]

    meanwhile 'mkdir "$work/clip.y4m"' $small --steps 200 -t 1
    claim "a folder made at the output's path: status 3, not $status" [ $status -eq 3 ]
    claim "a folder made at the output's path: its line" grep -q "clip.y4m: cannot write: .*; .* stays as .*[.]part$" "$work/err"
    claim "a folder made at the output's path: the .part file stays" grep -aq "^YUV4MPEG2 W32 H16 " "$work/clip.y4m.part"
    claim "a folder made at the output's path: no record without its clip" [ ! -e "$work/clip.y4m.json" ]
    rm -r "$work"/clip.y4m*

    meanwhile 'mkdir "$work/clip.y4m.json"' $small --steps 200 -t 1
    claim "a folder made at the record's path: status 3, not $status" [ $status -eq 3 ]
    claim "a folder made at the record's path: the clip stays" grep -aq "^YUV4MPEG2 W32 H16 " "$work/clip.y4m"
    rm -r "$work"/clip.y4m*

    "$sora" $small -q -o /dev/stdout x 2>"$work/err" | grep -aq "^YUV4MPEG2 W32 H16 "
    claim "a link to a pipe: the clip comes out" [ $? -eq 0 ]
    "$sora" $small -q -o /dev/stdout x 2>"$work/err" >"$work/clip.y4m"
    claim "a link to a redirected file: the clip comes out" [ "$(frames 32 16)" -eq 5 ]
    claim "a link to a redirected file: no record" [ "$(ls "$work" | grep -c clip)" -eq 1 ]
    chmod 600 "$work/clip.y4m"
    "$sora" $small -q -o "$work/clip.y4m" x 2>"$work/err"
    claim "a replaced file keeps its permissions" [ -n "$(find "$work/clip.y4m" -perm 600)" ]

    # The weight file is truncated while it is mapped.
    cp $model "$work/shrinking.gguf"
    meanwhile ': >"$work/shrinking.gguf"' -m "$work/shrinking.gguf" $settings --steps 1000
    claim "a model that is truncated meanwhile: status 2, not $status" [ $status -eq 2 ]
    claim "a model that is truncated meanwhile: its line" grep -q "^sora: cannot read an input file: it was truncated" "$work/err"
    claim "a model that is truncated meanwhile: nothing left" [ -z "$(ls "$work" | grep part)" ]

    # Closed standard streams: no file may get descriptor 0, 1 or 2, or messages would be written into it.
    "$sora" $small -o "$work/clip.y4m" x <&- >&- 2>&-
    status=$?
    claim "all streams closed: status 0, not $status" [ $status -eq 0 ]
    "$sora" $small -g 0.5 -o "$work/clip.y4m" x 2>&-
    claim "standard error closed: its warning is not in the clip" sh -c "! grep -aq warning '$work/clip.y4m'"
    claim "standard error closed: a whole clip" [ "$(frames 32 16)" -eq 5 ]
    "$sora" $small -o - x 2>"$work/err" >&-
    status=$?
    claim "standard output closed: status 3, not $status" [ $status -eq 3 ]
    claim "standard output closed: one line" [ "$(cat "$work/err")" = "sora: standard output: cannot write: Bad file descriptor" ]
    "$sora" $small --prompt-file - -o "$work/clip.y4m" 2>"$work/err" <&-
    status=$?
    claim "standard input closed: status 2, not $status" [ $status -eq 2 ]
    claim "standard input closed: its line" grep -q "^sora: --prompt-file -: Bad file descriptor" "$work/err"
    rm -f "$work"/clip.y4m*

    meanwhile 'kill -TERM $!' $small --steps 1000 -f 81
    claim "SIGTERM: status 130, not $status" [ $status -eq 130 ]
    claim "SIGTERM: one line" [ "$(cat "$work/err")" = "sora: interrupted" ]
    claim "SIGTERM: nothing left" [ -z "$(ls "$work" | grep clip)" ]
}

frames() { # frames WIDTH HEIGHT: prints the number of frames in clip.y4m
    echo $((($(wc -c <"$work/clip.y4m") - $(head -n 1 "$work/clip.y4m" | wc -c)) / (6 + $1 * $2 * 3 / 2)))
}

generation() {
    run $small -o "$work/clip.y4m" -n "the lazy dog" --check $golden --tolerance 1e-5 --dump "$work/dump" "a red fox"
    claim "equal to diffusers: status 0, not $status" [ $status -eq 0 ]
    claim "equal to diffusers: 25 tensors" grep -q "check passed: 25 tensors within 1e-05" "$work/err"
    header="YUV4MPEG2 W32 H16 F16:1 Ip A1:1 C420jpeg XCOLORRANGE=LIMITED XAIGEN=sora.c"
    claim "the header" [ "$(head -n 1 "$work/clip.y4m")" = "$header" ]
    claim "five frames" [ "$(frames 32 16)" -eq 5 ]
    claim "the record names no prompt" [ "$(grep -c fox "$work/clip.y4m.json")" -eq 0 ]
    if command -v sha256sum >/dev/null; then
        claim "the record's hash" grep -q "$(sha256sum <"$work/clip.y4m" | cut -c 1-64)" "$work/clip.y4m.json"
    fi
    mv "$work/clip.y4m" "$work/expected.y4m"
    for isa in naive generic avx2 avx512 avx512vnni avx512bf16 amx neon neondotprod; do
        same --isa $isa
    done
    for threads in 1 2 3; do
        same -t $threads
    done
    same --noise "$work/dump/noise.npy"
    same --embeds "$work/dump/prompt.embeds.npy"
    same --negative-embeds "$work/dump/negative.embeds.npy"
    same --prompt-file "$work/prompt"
    same --prompt-file "$work/prompt.bom"
    same --prompt-file "$work/prompt.le"
    same --prompt-file "$work/prompt.be"
    same --seed 7
    same --seed 4294967303 # the generator uses the low 32 bits
    same --seed -4294967289
    run $small -n "the lazy dog" -o - "a red fox"
    claim "standard output is the same file" cmp "$work/out" "$work/expected.y4m"
    claim "no output on standard error that is not a terminal" [ ! -s "$work/err" ]
}

# same OPTIONS...: the clip must have the same bytes with these options. Kernels that this machine lacks are skipped.
same() {
    [ "$1" = --prompt-file ] && prompt= || prompt="a red fox"
    run $small -n "the lazy dog" -o "$work/clip.y4m" "$@" ${prompt:+"$prompt"}
    grep -q "cannot run\|no $2 kernels" "$work/err" && return
    claim "the same bytes with $*" cmp "$work/clip.y4m" "$work/expected.y4m"
}

checks() {
    run -q -m "$work/changed.gguf" $settings -o "$work/clip.y4m" -n "the lazy dog" --check $golden \
        --tolerance 1e-5 "a red fox"
    claim "a changed weight: status 1, not $status" [ $status -eq 1 ]
    claim "a changed weight is found" grep -q "first in order of data flow is step000.cond.block01 " "$work/err"
    run -q -m "$work/changed.gguf" $settings -o "$work/clip.y4m" -n "the lazy dog" --check $golden --feed \
        --tolerance 1e-5 "a red fox"
    claim "--feed: a changed block fails in each pass, and nothing after it does" \
        grep -q "^check failed: 4 of 25 tensors, the first in order of data flow is step000.cond.block01 " "$work/err"
    claim "--feed: the four are the block's" [ "$(grep -c "^step00[01]\.\(un\)\?cond\.block01 .*FAILED" "$work/err")" -eq 4 ]
    run -q $small --seed 8 --shift 5 -g 4 -o "$work/clip.y4m" -n "a lazy dog and a cat" --check $golden --feed --tolerance 1e-5 x
    claim "--feed: with other settings, only the tensors that depend on the settings alone fail" [ "$(grep FAILED "$work/err" | cut -d " " -f 1 |
        tr '\n' ' ')" = "prompt.ids negative.ids noise timesteps sigmas step000.velocity step001.velocity " ]
    claim "--feed: the record has fed_by_check" grep -q '"fed_by_check": true' "$work/clip.y4m.json"
    "$sora" -q -m "$work/infinite.gguf" $settings -o "$work/clip.y4m" -n "the lazy dog" --check $golden "a red fox" 2>"$work/err"
    claim "--check of a run with infinity: the first tensor is named" \
        grep -q "^check failed: .* first in order of data flow is step000.cond.block01 (this run's value at .* is not finite)" "$work/err"
    run $small -o "$work/clip.y4m" -n "the lazy dog" --dump "$work/some" --dump-only "step00?.velocity" "a red fox"
    claim "--dump-only" [ "$(ls "$work/some" | tr '\n' ' ')" = "step000.velocity.npy step001.velocity.npy " ]
    for guidance in 1 0.5 0; do # as in diffusers; reference.py compares
        run $small --guidance $guidance -o "$work/clip.y4m" --dump "$work/unguided" "a red fox"
        claim "guidance $guidance computes no negative" [ -z "$(ls "$work/unguided" | grep "negative\|uncond")" ]
        [ $guidance = 1 ] && mv "$work/clip.y4m" "$work/unguided.y4m" && continue
        claim "guidance $guidance gives the clip of guidance 1" cmp "$work/clip.y4m" "$work/unguided.y4m"
        claim "guidance $guidance: a warning" grep -q "warning: guidance $guidance is taken as 1" "$work/err"
    done
}

# --noise in other types and orders of .npy.
noise() {
    run $small --noise $golden/noise.npy -o "$work/clip.y4m" x
    mv "$work/clip.y4m" "$work/noise.y4m"
    run $small --noise tests/goldens/npy/noise.npy -o "$work/clip.y4m" x
    claim "--noise of float64, big-endian, in Fortran order, with a batch axis" cmp "$work/clip.y4m" "$work/noise.y4m"
}

# The text encoder runs once, and its output makes several videos.
embeds() {
    run $small -n "the lazy dog" -o "$work/clip.y4m" "a red fox"
    mv "$work/clip.y4m" "$work/text.y4m"
    run -q -m $model --save-embeds "$work/fox.npy" "a red fox"
    claim "--save-embeds: status 0, not $status" [ $status -eq 0 ]
    claim "--save-embeds makes no video" [ ! -e out.y4m ]
    run -q -m $model --save-embeds "$work/dog.npy" "the lazy dog"
    run $small --embeds "$work/fox.npy" --negative-embeds "$work/dog.npy" --profile -o "$work/clip.y4m"
    claim "--embeds without a prompt: the same video" cmp "$work/clip.y4m" "$work/text.y4m"
    claim "--embeds: the text encoder is not run" [ -z "$(grep "^text encoder" "$work/err")" ]
    claim "--embeds: the record has the file's hash" grep -q "\"embeds_sha256\": \"$(sha256sum <"$work/fox.npy" | cut -c 1-64)" "$work/clip.y4m.json"
    claim "--embeds: the record has no prompt" [ -z "$(grep "prompt" "$work/clip.y4m.json")" ]
    refused 2 "--embeds nowhere.npy: No such file" $small --embeds nowhere.npy
    refused 2 "--embeds $golden/noise.npy: shape \[4, 2, 4, 8\], expected" $small --embeds $golden/noise.npy
    refused 2 "--negative-embeds tests/goldens/npy/f4_3.npy: shape \[3\], expected" $small --negative-embeds tests/goldens/npy/f4_3.npy x
    refused 2 "--save-embeds .*fox.npy: would overwrite the input file" $small --embeds "$work/fox.npy" --save-embeds "$work/fox.npy" x
    refused 2 "no prompt" $small --save-embeds "$work/other.npy"
}

# The smallest and largest seeds that torch accepts.
seeds() {
    for seed in -9223372036854775808 -2 9223372036854775813 18446744073709551615; do
        run $small --seed $seed -o "$work/clip.y4m" --check "tests/goldens/noise/seeds/$seed" --tolerance 1e-6 x
        claim "--seed $seed is torch's: status 0, not $status" [ $status -eq 0 ]
    done
    claim "the record has the seed" grep -q '"seed": 18446744073709551615,$' "$work/clip.y4m.json"
}

options() {
    for rate in 24=24:1 23.976=24000:1001 23.98=24000:1001 29.97=30000:1001 59.94=60000:1001 119.88=120000:1001 \
        12.5=25:2 16.0=16:1 59.9=599:10 30000/1001=30000:1001 50:2=50:2; do
        run $small -f 1 -g 1 --steps 1 --fps "${rate%=*}" -o "$work/clip.y4m" x
        claim "--fps ${rate%=*} is ${rate#*=}" grep -aq "^YUV4MPEG2 W32 H16 F${rate#*=} " "$work/clip.y4m"
    done
    claim "the record has the matrix" grep -q '"matrix": "BT.601"' "$work/clip.y4m.json"
    run $small -s 1280x16 -f 1 -g 1 --steps 1 -o "$work/clip.y4m" x
    claim "the record has the matrix of a wide clip" grep -q '"matrix": "BT.709"' "$work/clip.y4m.json"
    claim "the record has the hash that the weight file claims" grep -q '"model_tensors_sha256_claimed": "[0-9a-f]\{64\}"' "$work/clip.y4m.json"
    run $small -o "$work/clip.y4m" --chroma 444 --fps 30000:1001 --record-prompt -g 1 "a red fox"
    claim "--chroma and --fps" grep -aq "F30000:1001 Ip A1:1 C444 " "$work/clip.y4m"
    claim "--record-prompt" grep -q '"a red fox"' "$work/clip.y4m.json"
    run -m $model -s 16x16 -f 85 -g 1 --steps 1 --seed 7 -o "$work/clip.y4m" x
    claim "a warning about more frames than in training" grep -q "warning: --frames 85: the model was trained on clips of 81" "$work/err"
    run -m $model -s 32x16 --steps 1 --seed 7 -o "$work/clip.y4m" --no-record --seconds 0.3 x
    claim "--no-record" [ ! -e "$work/clip.y4m.json" ]
    claim "--seconds 0.3 is 5 frames" [ "$(frames 32 16)" -eq 5 ]
    claim "--no-record: no warning if there is no old record" [ ! -s "$work/err" ]
    for precision in "" f32 bf16; do # int8.gguf has default.precision int8
        run -m "$work/int8.gguf" $settings -o "$work/clip.y4m" ${precision:+--precision $precision} x
        claim "a file's own precision, then $precision" grep -q "\"precision\": \"${precision:-int8}\"" "$work/clip.y4m.json"
    done
    echo old >"$work/kept.y4m.json"
    run $small -o "$work/kept.y4m" --no-record x
    claim "--no-record: a warning about an old record" grep -q "warning: .*kept.y4m.json is the record of an earlier video" "$work/err"
    claim "--no-record: the old record stays" [ "$(cat "$work/kept.y4m.json")" = old ]
    run -m $model -s 32x16 -f 1 --steps 1 -o "$work/clip.y4m" x
    claim "a random seed is printed" grep -q "^seed [0-9]*$" "$work/err"
    mv "$work/clip.y4m" "$work/random.y4m"
    run -m $model -s 32x16 -f 1 --steps 1 -o "$work/clip.y4m" --seed "$(cut -d " " -f 2 "$work/err")" x
    claim "the printed seed gives the same clip" cmp "$work/clip.y4m" "$work/random.y4m"
    run $small -o "$work/clip.y4m" --profile x
    claim "--profile" [ "$(cut -f 1 "$work/err" | tr '\n' ' ')" = \
        "load text_encoder transformer sampler vae_decode output total peak_memory_mib " ]
    echo old >"$work/clip.keep"
    "$sora" $small --noise nowhere.npy -o "$work/clip.keep" x 2>"$work/err"
    claim "a failed run leaves the old file" [ "$(cat "$work/clip.keep")" = old ]
}

docs_show_help() {
    "$sora" --help >"$work/help"
    sed -n '/^```$/,/^```$/p' docs/options.md | sed '1d;/^```$/,$d' | cmp - "$work/help"
}

information() {
    run --help
    claim "--help: status 0" [ $status -eq 0 ]
    for option in model prompt prompt-file negative embeds negative-embeds save-embeds output size frames seconds fps steps guidance shift sampler seed \
        image video strength extend threads precision isa noise at story window sink positions drift dump dump-only check feed tolerance chroma \
        record-prompt no-record label mark verify producer produce-id profile info tokenize preview quiet help \
        version; do
        claim "--help lists --$option" grep -q -- "--$option " "$work/out"
    done
    run --version
    claim "--version" grep -q "^sora [0-9.]*, [a-z0-9]* kernels" "$work/out"
    run -m $model --info
    claim "--info lists a key" grep -q "^wan.dim  *24$" "$work/out"
    claim "--info lists a tensor" grep -q "^blocks.0.ffn.0.weight  *f32  *\[40, 24\]$" "$work/out"
    run -m tests/goldens/weights/foreign.gguf --info
    claim "--info of another program's file: status 0, not $status" [ $status -eq 0 ]
    claim "--info of another program's file: a type that is not read" grep -q "^of.q4_k  *q4_k  *\[1, 256\]$" "$work/out"
    claim "docs/options.md shows --help" docs_show_help
    run -m $model --tokenize "a red fox"
    claim "--tokenize" [ "$(cat "$work/out")" = "$(od -A n -t d4 -j 128 $golden/prompt.ids.npy | xargs)" ]
}

# A model that generates in chunks: compared with Self-Forcing's code, written to a pipe, invalid options.
chunks() {
    causal=tests/goldens/causal
    short="-m $causal/model.gguf -f 21 --seed 7"
    run -m $causal/model.gguf --seed 7 -o "$work/clip.y4m" --check $causal --tolerance 1e-5 "A red fox jumps over 12 lazy dogs."
    claim "chunks equal to Self-Forcing: status 0, not $status" [ $status -eq 0 ]
    claim "chunks equal to Self-Forcing: 20 tensors" grep -q "check passed: 20 tensors within 1e-05" "$work/err"
    claim "chunks: the default is 45 frames" [ "$(frames 48 32)" -eq 45 ]
    run $short -o "$work/clip.y4m" --dump "$work/chunks" --window 5 --sink 1 --at "0.3 a dog" "a red fox"
    claim "chunks: noise.npy is dumped" [ -s "$work/chunks/noise.npy" ]
    claim "chunks: 51 tensors of three chunks are dumped" [ "$(ls "$work/chunks" | grep -c '^chunk00[0-2][.]')" -eq 51 ]
    claim "chunks: the second prompt's tensor is dumped" [ -s "$work/chunks/prompt01.embeds.npy" ]
    claim "chunks: the record has the steps" grep -q '"timesteps": "1000 937.5 833.333313 625"' "$work/clip.y4m.json"
    claim "chunks: the record has the story, as hashes" grep -q '"prompt01_sha256"' "$work/clip.y4m.json"
    mv "$work/clip.y4m" "$work/expected.y4m"
    run $short -o - --window 5 --sink 1 --at "0.3 a dog" "a red fox"
    claim "chunks: standard output is the same file" cmp "$work/out" "$work/expected.y4m"
    printf '# a story\n0 a red fox\n\n0:00.3 a dog\n' >"$work/story"
    run $short -o "$work/clip.y4m" --window 5 --sink 1 --story "$work/story" --noise "$work/chunks/noise.npy" --drift
    claim "chunks: a story and a file of noise are the same" cmp "$work/clip.y4m" "$work/expected.y4m"
    claim "--drift: a header, a line for each chunk, a summary" [ "$(cut -f 1 "$work/err" | tr '\n' ' ')" = "chunk 0 1 drift " ]
    claim "--drift: columns" [ "$(awk -F '\t' 'NF != 14' "$work/err" | wc -l)" -eq 0 ]
    run $short -f 5 -o "$work/clip.y4m" x
    claim "a clip of 5 frames ends inside a chunk" [ "$(frames 48 32)" -eq 5 ]
    refused 2 "--at or --story: needs a model that generates in chunks" $small --at "1 a dog" x
    refused 2 "--window: needs a model that generates in chunks" $small --window 3 x
    refused 2 "--window: the window is 2 frames, expected at least a chunk of 3, or 0 for all frames" $short --window 2 x
    refused 2 "--sink: the sink is 3 frames, expected 0 without a window" $short --sink 3 x
    refused 2 "--window: the sink is 4 frames, expected at most 3, which is the window of 6 less a chunk of 3" $short --window 6 --sink 4 x
    refused 2 "--positions: 'left' is not absolute or relative" $short --positions left x
    refused 2 "--steps: this model has a fixed schedule and takes no other: 4 steps of renoise at timesteps 1000 937.5 833.333313 625" $short --steps 3 x
    refused 2 "--shift: this model has a fixed schedule" $short --shift 5 x
    refused 2 "--sampler: this model has a fixed schedule" $short --sampler euler x
    refused 2 "--at: 'soon a dog' does not begin with a time" $short --at "soon a dog" x
    refused 2 "--at: time 2 s is not after 3 s" $short --at "3 a" --at "2 b" x
    refused 2 "two stories: '$work/story' and '/dev/null'" $short --story "$work/story" --story /dev/null x
    printf '1 a\n0.5 b\n' >"$work/story"
    refused 2 "--story $work/story: line 2: time 0.5 s is not after 1 s" $short --story "$work/story" x
    refused 2 "--story nowhere: No such file" $short --story nowhere x
    printf '\377\376x\000\n\000' >"$work/story"
    refused 2 "--story $work/story: line 1: 'x' does not begin with a time" $short --story "$work/story" x
    printf '0\000 a\n' >"$work/story"
    refused 2 "--story $work/story: byte 1 is 0, expected text in UTF-8" $short --story "$work/story"
    refused 2 "no prompt: the story's first line is at 1 seconds" $short --at "1 a"
    refused 2 "two prompts: 'x' and 'a'" $short --at "0 a" x
    run $short -o "$work/clip.y4m" --at "9 a dog" --dump "$work/unused" --dump-only "prompt*" x
    claim "a prompt after the end is not encoded" [ "$(ls "$work/unused" | tr '\n' ' ')" = "prompt.embeds.npy prompt.ids.npy " ]
    claim "a prompt after the end: a warning" grep -q "warning: the prompt at 9 s is not used" "$work/err"
    run $small -o "$work/clip.y4m" " "
    claim "an empty prompt: a warning" grep -q "warning: the prompt is empty" "$work/err"
}

# Models that start from a picture; two experts.
pictures() {
    pictures=tests/goldens/pictures
    both="-m $pictures/model.gguf -s 32x16 -f 9 --steps 3 -g 3 --guidance-2 2 --shift 3 --sampler unipc --seed 7"
    ends="--image $pictures/first.y4m --last-image $pictures/last.y4m"
    run $both $ends -n "the lazy dog" -o "$work/clip.y4m" --check $pictures/planes --tolerance 1e-5 "a red fox"
    claim "first and last picture, two experts equal diffusers: status 0, not $status" [ $status -eq 0 ]
    claim "first and last picture, two experts equal diffusers: 25 tensors" grep -q "check passed: 25 tensors within 1e-05" "$work/err"
    claim "the record has pictures, guidances and boundary" [ "$(grep -c \
        '"image_sha256"\|"last_image_sha256"\|"guidance": 3\|"guidance_2": 2\|"boundary_timestep": 7' "$work/clip.y4m.json")" -eq 5 ]
    "$sora" $both --image $pictures/first.y4m --last-image - -n "the lazy dog" -o "$work/clip.y4m" "a red fox" <$pictures/last.y4m 2>"$work/err"
    claim "the last picture from standard input: status 0, not $?" [ $? -eq 0 ]
    clip=tests/goldens/images/clip.y4m
    (head -n 1 $clip && tail -c $((6 + 3 * 32 * 16)) $clip) >"$work/ending.y4m"
    run $both --image "$work/ending.y4m" --chroma 444 -o "$work/clip.y4m" x
    mv "$work/clip.y4m" "$work/alone.y4m"
    run -m $pictures/model.gguf --steps 3 -g 3 --guidance-2 2 --shift 3 --sampler unipc --seed 7 \
        --video $clip --extend -f 8 --chroma 444 -o "$work/clip.y4m" x
    claim "a clip that goes on from its last frame: status 0, not $status" [ $status -eq 0 ]
    tail -n +2 "$work/clip.y4m" >"$work/found"
    tail -n +2 $clip >"$work/wanted"
    claim "it begins with the clip's 9 frames, of $((6 + 3 * 32 * 16)) bytes each" cmp -n 13878 "$work/found" "$work/wanted"
    claim "then 8 frames come as from that picture" [ "$(tail -c 12336 "$work/clip.y4m" | cksum)" = "$(tail -c 12336 "$work/alone.y4m" | cksum)" ]
    refused 2 "--image: not given, and this model (Wan) makes a clip from a picture and a prompt" $both x
    refused 2 "--strength: needs another model; this one (Wan) begins with a picture: --image or --extend" $both --video $clip --strength 1 x
    refused 2 "--last-image nowhere.ppm: No such file" $both --image $pictures/first.y4m --last-image nowhere.ppm x
    refused 2 "standard input: 2 options read it (-), expected one" $both --image - --last-image - x
    refused 2 "--guidance-2: '-1' is not a number from 0 to 1000" -m $pictures/model.gguf --guidance-2 -1 x
}

# Pictures and clips to begin from, and a picture as the output.
# Steps that are left out, and the tiny decoder.
quicker() {
    long="-m $model -s 32x16 -f 5 -g 3 --shift 3 --seed 7"
    run $long --steps 20 --easycache 1e-9 --no-record -o "$work/clip.y4m" "a red fox"
    mv "$work/clip.y4m" "$work/expected.y4m"
    run $long --steps 20 --no-record -o "$work/clip.y4m" "a red fox"
    claim "--easycache that leaves out nothing changes nothing" cmp "$work/clip.y4m" "$work/expected.y4m"
    run $long --steps 20 --easycache 1e9 --profile -o "$work/clip.y4m" "a red fox"
    claim "--easycache: 18 passes are left out, by --profile" grep -q "^passes_left_out	18$" "$work/err"
    claim "--easycache: 22 passes and 2 contexts" grep -q "^transformer	24	" "$work/err"
    claim "--easycache: the record" grep -q '"easycache": 1e+09' "$work/clip.y4m.json"
    claim "--easycache: the passes in the record" grep -q '"passes_left_out": 18$' "$work/clip.y4m.json"
    refused 2 "--easycache: 'much'" $long --easycache much x
    refused 2 "--easycache: '-1'" $long --easycache -1 x
    refused 2 "--easycache: the first 10 steps and the last are always computed, expected at least 12 steps, found 11" \
        $long --steps 11 --easycache 0.05 x
    refused 2 "--easycache: .* found 10$" $long --steps 20 --video tests/goldens/images/clip.y4m --strength 0.5 \
        --easycache 0.05 x
    refused 2 "--easycache: needs a model that generates the whole clip" -m $causal/model.gguf --easycache 0.05 x
    tiny="-m tests/goldens/tiny/model.gguf -s 32x16 -f 9 --steps 2 -g 1 --shift 3 --seed 7 --decoder tiny"
    run $tiny -o "$work/clip.y4m" --check tests/goldens/tiny --tolerance 1e-5 "a red fox"
    claim "the tiny decoder equals TAEHV's: status 0, not $status" [ $status -eq 0 ]
    claim "the tiny decoder equals TAEHV's: 2 tensors" grep -q "check passed: 2 tensors within 1e-05" "$work/err"
    claim "the tiny decoder: the record" grep -q '"decoder": "tiny"' "$work/clip.y4m.json"
    refused 2 "--decoder: 'small' is not full or tiny" $small --decoder small x
    refused 2 "--decoder tiny: the model file has none; export.py --vae-tiny FILE adds one$" $small --decoder tiny x
}

images() {
    images=tests/goldens/images
    anew="-m $model --steps 3 -g 3 --shift 3 --sampler unipc --seed 7"
    run $anew --video $images/clip.y4m --strength 0.7 -n "the lazy dog" -o "$work/clip.y4m" --check $images/anew --tolerance 1e-5 "a red fox"
    claim "a clip made anew equals diffusers: status 0, not $status" [ $status -eq 0 ]
    claim "a clip made anew equals diffusers: 19 tensors" grep -q "check passed: 19 tensors within 1e-05" "$work/err"
    claim "its size, rate and length are the source's" [ "$(head -n 1 "$work/clip.y4m" | cut -d " " -f 2-4)$(frames 32 16)" = "W32 H16 F24:19" ]
    claim "the record has the source and the strength" [ "$(grep -c '"video_sha256": "[0-9a-f]\{64\}"\|"strength": 0.7' "$work/clip.y4m.json")" -eq 2 ]
    mv "$work/clip.y4m" "$work/expected.y4m"
    for isa in naive generic; do
        "$sora" $anew --video - --strength 0.7 -n "the lazy dog" -t 3 --isa $isa -o "$work/clip.y4m" "a red fox" <$images/clip.y4m 2>"$work/err"
        claim "the same from standard input, with $isa kernels" cmp "$work/clip.y4m" "$work/expected.y4m"
    done
    run $anew --video $images/clip.y4m --strength 0.7 -f 5 -s 24x16 -o "$work/clip.y4m" x
    claim "five frames of it, in another size" [ "$(frames 24 16)" -eq 5 ]
    run $small -f 1 -o "$work/clip.ppm" x
    claim "a picture: status 0, not $status" [ $status -eq 0 ]
    claim "a picture is a PPM" [ "$(head -n 2 "$work/clip.ppm" | tr '\n' ' ')$(wc -c <"$work/clip.ppm")" = "P6 32 16 1549" ]
    run $small -f 1 --mark --label -o "$work/clip.ppm" x
    "$sora" --verify "$work/clip.ppm" >"$work/out" 2>"$work/err"
    claim "--verify reads a picture and its record" grep -q "the SHA-256 of the video agrees" "$work/out"

    causal=tests/goldens/causal
    short="-m $causal/model.gguf -s 48x32 --seed 7"
    run $short --image $images/picture.ppm -f 9 -o "$work/clip.y4m" --dump "$work/image" x
    claim "a picture as the first frame: status 0, not $status" [ $status -eq 0 ]
    claim "a picture as the first frame: its tensors" [ -s "$work/image/image.npy" -a -s "$work/image/encoded.npy" -a \
        -s "$work/image/given000.cache.block01.npy" -a -s "$work/image/chunk000.step003.latents.npy" ]
    claim "a picture as the first frame: 9 frames" [ "$(frames 48 32)" -eq 9 ]
    run $short --video $images/clip.y4m --extend -f 24 -o "$work/clip.y4m" --check $causal/given3 --feed --tolerance 1e-5 \
        "A red fox jumps over 12 lazy dogs."
    claim "given latents: all but those that are fed equal Self-Forcing's" grep -q \
        "^check failed: 1 of 3 tensors, the first in order of data flow is encoded " "$work/err"
    run $short -f 9 -o "$work/clip.y4m" x
    mv "$work/clip.y4m" "$work/begun.y4m"
    run $short --video "$work/begun.y4m" --extend --seconds 0.5 -o "$work/clip.y4m" x
    claim "a clip that goes on: 8 frames more" [ "$(frames 48 32)" -eq 17 ]
    claim "a clip that goes on begins with its own bytes" cmp -n "$(wc -c <"$work/begun.y4m")" "$work/begun.y4m" "$work/clip.y4m"
    claim "a clip that goes on: the record" grep -q '"frames_kept": 9' "$work/clip.y4m.json"
    head -c $((6 * (6 + 48 * 32 * 3 / 2) + $(head -n 1 "$work/begun.y4m" | wc -c))) "$work/begun.y4m" >"$work/six.y4m"
    run $short --video "$work/six.y4m" --extend -f 4 -o "$work/clip.y4m" x
    claim "six frames: a warning" grep -q "warning: --video $work/six.y4m: 5 of its 6 frames are used, a multiple of 4 plus 1" "$work/err"
    refused 2 "--frames: 1 more frames with --extend is not a multiple of 4, such as 4 or 8$" $short --video "$work/begun.y4m" --extend -f 1 x
    refused 2 "--frames: 5 more frames with --extend is not a multiple of 4, such as 4 or 8$" $short --video "$work/begun.y4m" --extend -f 5 x
    refused 2 "--seconds: 0.05 more with --extend is no frame" $short --video "$work/begun.y4m" --extend --seconds 0.05 x
    refused 2 "--frames 1: with --image that frame is given, expected at least 5" $short --image $images/picture.ppm -f 1 x
    refused 2 "--strength: the model generates chunks of 3 latent frames, expected a number of frames that fills them, found 5" \
        $short --video "$work/begun.y4m" -f 5 --strength 1 x

    refused 2 "--output $work/clip.ppm: a PPM is one picture, and the clip has 5 frames: give --frames 1, or -o $work/clip.y4m" \
        $small -o "$work/clip.ppm" x
    refused 2 "--image: needs a model that generates in chunks, or Wan 2.2's TI2V-5B or I2V-A14B; this one" $small --image $images/picture.ppm x
    refused 2 "--extend: needs a model that generates in chunks, or Wan 2.2's TI2V-5B or I2V-A14B; this one" $anew --video $images/clip.y4m --extend x
    refused 2 "--last-image: needs a model such as Wan 2.2's I2V-A14B or TI2V-5B" $short --image $images/picture.ppm --last-image $images/picture.ppm x
    refused 2 "--last-image: needs --image FILE, or --video FILE with --extend" $small --last-image $images/picture.ppm x
    refused 2 "--guidance-2: needs a model with two experts, this one has one transformer" $small --guidance-2 3 x
    refused 2 "--image nowhere.ppm: No such file" $small --image nowhere.ppm x
    refused 2 "--image $golden/noise.npy: expected a PPM (P6) or a Y4M" $small --image $golden/noise.npy x
    refused 2 "--video $images/picture.ppm: this is a PPM, expected a Y4M; --image takes a PPM" $anew --video $images/picture.ppm --extend x
    head -c 13000 $images/clip.y4m >"$work/cut.y4m"
    refused 2 "--video $work/cut.y4m: the last frame is cut off" $anew --video "$work/cut.y4m" --strength 1 x
    refused 2 "--image and --video: expected one of them, found both" $anew --video x --image x --extend x
    refused 2 "--extend: needs --video FILE" $small --extend x
    refused 2 "--strength: needs --video FILE" $small --strength 1 x
    refused 2 "--video: needs --strength S or --extend" $small --video x x
    refused 2 "--extend and --strength: expected one of them, found both" $small --video x --strength 1 --extend x
    refused 2 "--strength: 0.3 of 3 steps is none, expected at least 0.3333" $anew --video $images/clip.y4m --strength 0.3 x
    refused 2 "--strength: '1.1' is not a number from 0 to 1" $anew --video $images/clip.y4m --strength 1.1 x
    refused 2 "--frames 13: $images/clip.y4m has 9 that can be used" $anew --video $images/clip.y4m --strength 1 -f 13 x
    refused 2 "standard input: 2 options read it (-), expected one" $anew --video - --prompt-file - --strength 1
    cp $images/clip.y4m "$work/input.y4m"
    refused 2 "would overwrite the input file .*input.y4m" $anew --video "$work/input.y4m" --strength 1 -o "$work/input.y4m" x
}

# told STATUS TEXT ARGUMENTS...: as refused, but what is there before stays, and is named clip.y4m.
told() {
    expected=$1 text=$2
    shift 2
    "$sora" "$@" -o "$work/clip.y4m" >"$work/out" 2>"$work/err" </dev/null
    status=$?
    claim "$*: status $expected, not $status" [ "$status" = "$expected" ]
    claim "$*: one line" [ "$(grep -c ^sora: "$work/err")" -eq 1 ]
    claim "$*: '$text'" grep -q "^sora: .*$text" "$work/err"
}

# stopped SIGNAL CONDITION OPTION...: a run that keeps its state all the time gets the signal once the condition holds.
stopped() {
    signal=$1 condition=$2
    shift 2
    SORA_STATE_SECONDS=0 "$sora" "$@" -o "$work/clip.y4m" 2>"$work/err" &
    until eval "$condition" || ! kill -0 $! 2>/dev/null; do :; done
    sleep 0.05
    kill -$signal $!
    wait $! 2>/dev/null
    status=$?
}

goes_on() { # goes_on NAME: the stopped run ends with the bytes and the record that are expected, and leaves nothing else
    "$sora" --resume -t 1 -q -o "$work/clip.y4m" 2>"$work/err"
    status=$?
    claim "$1: goes on with status 0, not $status" [ $status -eq 0 ]
    claim "$1: the same clip" cmp "$work/clip.y4m" "$work/expected.y4m"
    claim "$1: the same record" cmp "$work/clip.y4m.json" "$work/expected.y4m.json"
    claim "$1: nothing else" [ "$(ls "$work" | grep -c clip)" -eq 2 ]
}

expect() { # expect OPTION...: what an undisturbed run gives
    run -q "$@" -o "$work/clip.y4m"
    claim "a short run keeps no state" [ "$(ls "$work" | grep -c clip)" -eq 2 ]
    mv "$work/clip.y4m" "$work/expected.y4m"
    mv "$work/clip.y4m.json" "$work/expected.y4m.json"
}

state='[ -e "$work/clip.y4m.state" ]'

resuming() {
    cp $model "$work/mine.gguf"
    cp $golden/noise.npy "$work/mine.npy"
    mine="-m $work/mine.gguf $settings --steps 200 --noise $work/mine.npy"
    expect $mine "a red fox"
    stopped TERM "$state" $mine "a red fox"
    claim "interrupted: status 130, not $status" [ $status -eq 130 ]
    claim "interrupted: how to go on" [ "$(cat "$work/err")" = "sora: interrupted; to resume: sora --resume -o $work/clip.y4m" ]
    claim "interrupted: no clip" [ ! -e "$work/clip.y4m" ]
    claim "a state is nobody else's to read" [ -n "$(find "$work/clip.y4m.state" -perm 600)" ]
    told 2 "clip.y4m.state: an unfinished run of this output; resume it with --resume, or delete the file$" $mine "a red fox"
    told 2 "--steps: cannot be given with --resume, which takes it from $work/clip.y4m.state$" --resume --steps 3
    told 2 "--prompt: cannot be given with --resume" --resume "a red fox"
    told 2 "--no-state: cannot be given with --resume" --resume --no-state
    cp "$work/clip.y4m.state" "$work/kept.state"
    head -c 3000 "$work/kept.state" >"$work/clip.y4m.state"
    told 2 "--resume: $work/clip.y4m.state: truncated or damaged: its SHA-256 does not match$" --resume
    tr f F <"$work/kept.state" >"$work/clip.y4m.state"
    told 2 "truncated or damaged" --resume
    echo hello >"$work/clip.y4m.state"
    told 2 "not a state of this version of sora" --resume
    cp "$work/kept.state" "$work/clip.y4m.state"
    sed 's/fp16/bf16/' "$work/fp16.gguf" >"$work/mine.gguf"
    told 2 "clip.y4m.state: the run was begun with another model file$" --resume
    cp $model "$work/mine.gguf"
    cp tests/goldens/npy/noise.npy "$work/mine.npy"
    told 2 "clip.y4m.state: the run was begun with another --noise file$" --resume
    cp $golden/noise.npy "$work/mine.npy"
    goes_on "interrupted"
    told 2 "--resume: $work/clip.y4m.state: No such file" --resume

    # Chunk by chunk, with all that moves: a story, a window, a report, a cache that is written anew.
    chunks="-m $causal/model.gguf --seed 3 --fps 4 --seconds 60 --window 6 --sink 1 --drift --mark --label"
    story="0.0 a red fox\n2.5 a dog\n9 a cat"
    printf "$story" >"$work/story"
    expect $chunks --story "$work/story"
    tail -n 1 "$work/err" >"$work/drift"
    stopped KILL "$state" $chunks --story "$work/story"
    claim "killed: no clip" [ ! -e "$work/clip.y4m" ]
    printf "0 something else" >"$work/story"
    goes_on "killed"
    claim "killed: the same report" [ "$(tail -n 1 "$work/err")" = "$(cat "$work/drift")" ]
    printf "$story" >"$work/story"
    rm "$work/clip.y4m"
    (ulimit -f 800 && SORA_STATE_SECONDS=0 exec "$sora" $chunks --story "$work/story" -o "$work/clip.y4m" 2>"$work/err")
    claim "no more room: how to go on" [ "$(tail -n 1 "$work/err")" = \
        "sora: $work/clip.y4m: cannot write: File too large; to resume: sora --resume -o $work/clip.y4m" ]
    cp "$work/clip.y4m.state" "$work/kept.state"
    cp "$work/clip.y4m.part" "$work/kept.part"
    printf "x" | dd of="$work/clip.y4m.part" bs=1 seek=500 conv=notrunc 2>/dev/null
    told 2 "clip.y4m.state: $work/clip.y4m.part does not begin with the [0-9]* frames that were written$" --resume
    rm "$work/clip.y4m.part"
    told 2 "does not begin with the [0-9]* frames" --resume
    cp "$work/kept.part" "$work/clip.y4m.part"
    goes_on "no more room"
    claim "no more room: the same report" [ "$(tail -n 1 "$work/err")" = "$(cat "$work/drift")" ]
    cp "$work/kept.state" "$work/clip.y4m.state" # as if killed when the file had got its name
    goes_on "killed after the last frame"

    # Killed while the encoder has read a part of its clip.
    mv "$work/expected.y4m" "$work/source.y4m"
    anew="-m $causal/model.gguf --video $work/source.y4m --strength 1 -f 237 --seed 3"
    expect $anew "a red fox"
    stopped KILL "$state" $anew "a red fox"
    claim "killed in the source: no clip" [ ! -e "$work/clip.y4m" ]
    goes_on "killed in the source"
    rm "$work/clip.y4m" "$work/clip.y4m.json"

    # Two at once, and none at all.
    SORA_STATE_SECONDS=0 "$sora" $mine "a red fox" -o "$work/clip.y4m" &
    first=$!
    until [ -e "$work/clip.y4m.state" ]; do :; done
    kill -STOP $first
    told 3 "clip.y4m: another process is writing it ($work/clip.y4m.part is locked)$" --resume
    rm "$work/clip.y4m.state"
    told 3 "clip.y4m: another process is writing it ($work/clip.y4m.part is locked)$" $mine x
    claim "a second run leaves the first one's file" [ -e "$work/clip.y4m.part" ]
    kill -KILL $first
    wait $first 2>/dev/null
    "$sora" $mine -q "a red fox" -o "$work/clip.y4m" 2>"$work/err"
    claim "what a killed run left is taken over" [ "$(frames 32 16)" -eq 5 ]
    SORA_STATE_SECONDS=0 "$sora" --no-state -q $mine -o "$work/clip.y4m" x & sleep 0.1
    claim "--no-state" [ ! -e "$work/clip.y4m.state" ]
    wait $!
    SORA_STATE_SECONDS=0 "$sora" -q $mine -o - x >"$work/out"
    claim "standard output has no state" [ ! -e ./-.state ]
    rm -f "$work"/clip*
}

# The bundled model: tensors compared with diffusers, its defaults, prompts with words that it has not learned.
demo() {
    run -m models/demo.gguf -s 48x48 -f 21 --seed 7 -o "$work/clip.y4m" --check tests/goldens/demo --tolerance 1e-5 \
        "a blue star bounces on the grass"
    claim "the bundled model equals diffusers: status 0, not $status" [ $status -eq 0 ]
    run -m models/demo.gguf --seed 1 -o "$work/clip.y4m" "a blue star bounces on the grass"
    digest=$(sed -n 's/.*"y4m_sha256": "\([0-9a-f]*\)".*/\1/p' "$work/clip.y4m.json")
    claim "its defaults: the clip of docs/numbers.md, not $digest" grep -q "^$digest  out.y4m" docs/numbers.md
    claim "its defaults: 96x96 at 16 a second" grep -aq "^YUV4MPEG2 W96 H96 F16:1 " "$work/clip.y4m"
    claim "its defaults: 33 frames" [ "$(frames 96 96)" -eq 33 ]
    claim "its defaults: f32" grep -q '"precision": "f32"' "$work/clip.y4m.json"
    page=$(head -c 4000 README.md)
    for prompt in "" "un renard roux court dans la neige" "红色的狐狸 🦊" "$page"; do
        run -m models/demo.gguf -f 1 --seed 7 -o "$work/clip.y4m" --prompt "$prompt"
        claim "a prompt of unknown words, $(printf %.10s "$prompt" | tr '\n' ' '): status 0, not $status" [ $status -eq 0 ]
    done
}

# The Makefile's rules, with a compiler that only logs its arguments; and an installation into a folder with spaces.
building() {
    cat >"$work/cc" <<'end'
echo "$@" >>"$(dirname "$0")/calls"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : >"$2"; shift; done
end
    build() { # build ARGUMENTS...: writes the compiler's calls to $work/calls
        : >"$work/calls"
        env -u MAKEFLAGS -u MFLAGS make -s BUILD="$work/build" CC="sh $work/cc" OPENMP=0 "$@" "$work/build/sora" 2>"$work/err"
    }
    build
    all=$(wc -l <"$work/calls")
    claim "make compiles: $all calls" [ "$all" -gt 20 ]
    build
    claim "make again does nothing" [ ! -s "$work/calls" ]
    build LDFLAGS=-static
    claim "other LDFLAGS: links again, compiles nothing" [ "$(grep -c . "$work/calls")$(grep -c -- -static "$work/calls")" = 11 ]
    build LDFLAGS=-static CFLAGS=-O1
    claim "other CFLAGS: compiles and links again" [ "$(wc -l <"$work/calls")" -eq "$all" ]

    [ -x ./sora ] || return
    place() { env -u MAKEFLAGS -u MFLAGS make -s -o sora "$1" DESTDIR="$work/a stage" PREFIX="/it's here" >/dev/null 2>"$work/err"; }
    place install
    installed="$work/a stage/it's here/bin/sora"
    run -h
    claim "installed in a folder with spaces: the program" cmp ./sora "$installed"
    claim "installed in a folder with spaces: its model" cmp models/demo.gguf "$work/a stage/it's here/share/sora/demo.gguf"
    claim "the installed program finds the installed model" sh -c "cd / && \"$installed\" --info | grep -q '^wan.dim '"
    place uninstall
    claim "uninstall leaves no file" [ -z "$(find "$work/a stage" -type f)" ]
    claim "uninstall leaves no folder of its own" [ ! -e "$work/a stage/it's here/share/sora" ]
    claim "a second uninstall succeeds" place uninstall
}

# write_video FILE ONE OTHER: writes a .npy of shape [3,5,16,32] with two float32 values in turn, given as octal escapes.
write_video() {
    printf '\223NUMPY\001\000v\000%-117s\n' "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 5, 16, 32)}" >"$1"
    i=0
    while [ $i -lt 3840 ]; do
        printf "$2$3$2$3$2$3$2$3$2$3$2$3$2$3$2$3"
        i=$((i + 8))
    done >>"$1"
}

# A clip of one colour, or of clamped values, gets one warning with the likely cause.
failures() {
    mkdir "$work/failed"
    fail() { run -m $model -s 32x16 -f 5 --shift 3 --seed 7 -q -o "$work/clip.y4m" --check "$work/failed" --feed "$@" x; }
    write_video "$work/failed/video.npy" '\000\000\200\277' '\000\000\200\277'
    fail --steps 2 -g 3
    claim "frames of one colour: one line" [ "$(grep -c warning "$work/err")" -eq 1 ]
    claim "frames of one colour" grep -q "warning: 5 of 5 frames have one colour only; likely cause: 2 steps with guidance 3" "$work/err"
    write_video "$work/failed/video.npy" '\000\000\200\077' '\000\000\200\277'
    fail --steps 9 -g 20
    claim "clamped frames" grep -q "warning: 100 % of the clip's values are at the ends .* --guidance 20 is more" "$work/err"
    fail --steps 9 -g 3 --precision bf16
    claim "clamped frames in bf16" grep -q "of their range; likely cause: .* try --precision f32$" "$work/err"
    fail --steps 9 -g 3 --precision f32
    claim "clamped frames in f32" grep -q "of their range; likely cause: .* or damaged weights$" "$work/err"
    write_video "$work/failed/video.npy" '\000\000\200\077' '\000\000\000\077'
    fail --steps 2 -g 3
    claim "half of the values clamped: no warning" [ "$(grep -c warning "$work/err")" -eq 0 ]
}

# --verify of a clip with mark and record, with a changed record, with only the mark, with neither.
trust() {
    run -m models/demo.gguf -f 13 --seed 7 --mark --label --producer "Somebody" -o "$work/clip.y4m" x
    cp "$work/clip.y4m" "$work/kept.y4m"
    cp "$work/clip.y4m.json" "$work/kept.y4m.json"
    cp "$work/clip.y4m.json" "$work/whole.json"
    run --verify "$work/kept.y4m"
    claim "--verify: status 0, not $status" [ $status -eq 0 ]
    claim "--verify: the mark" grep -q "^mark: found, .* bits [0-9a-f]\{16\}$" "$work/out"
    claim "--verify: both hashes" [ "$(grep -c "^record: .*SHA-256.* agrees$" "$work/out")" -eq 2 ]
    claim "--verify: the mark is the record's" grep -q "^record: \(5[2-9]\|6[0-4]\) of the mark's 64 bits agree" "$work/out"
    claim "the record has the ContentProducer field" grep -q '"ContentProducer": "Somebody"' "$work/kept.y4m.json"
    "$sora" -q -m models/demo.gguf -f 13 --seed 7 --mark --label --producer "Somebody" -o - x 2>"$work/err" | "$sora" --verify - >"$work/out"
    claim "--verify at the other end of a pipe" grep -q "^video: -, 13 frames of 96x96, SHA-256 $(sha256sum "$work/kept.y4m" | cut -c 1-64)" "$work/out"
    sed -i 's/"seed": 7/"seed": 8/' "$work/kept.y4m.json"
    run --verify "$work/kept.y4m"
    claim "--verify of a changed record: status 1, not $status" [ $status -eq 1 ]
    claim "--verify of a changed record" grep -q "^record: its own SHA-256 DIFFERS" "$work/out"
    rm "$work/kept.y4m.json"
    run --verify "$work/kept.y4m"
    claim "--verify by the mark alone: status 0, not $status" [ $status -eq 0 ]
    claim "--verify: no record" grep -q "^record: .*kept.y4m.json: No such file" "$work/out"

    verify_record() { # verify_record TEXT: --verify ends with 1, and says TEXT of the record beside the clip
        run --verify "$work/kept.y4m"
        claim "--verify, '$1': status 1, not $status" [ $status -eq 1 ]
        claim "--verify: '$1'" grep -q "^record: $1" "$work/out"
    }
    "$sora" $small -q --mark -o "$work/other.y4m" x
    cp "$work/other.y4m.json" "$work/kept.y4m.json"
    verify_record "the SHA-256 of the video DIFFERS"
    claim "--verify: another clip's record agrees with its own SHA-256" grep -q "its own SHA-256 agrees" "$work/out"
    claim "--verify: the mark is not another clip's" grep -q "^record: \(2[0-9]\|3[0-9]\|4[0-4]\) of the mark's 64 bits" "$work/out"
    head -c 400 "$work/whole.json" >"$work/kept.y4m.json"
    verify_record "its own SHA-256 DIFFERS"
    printf '{"tool": "another"}' >"$work/kept.y4m.json"
    verify_record "not a record of sora.c"
    : >"$work/kept.y4m.json"
    verify_record "not a record of sora.c"
    printf '{"tool": "sora.c", "version": "\033[31m", "model": "\302\233x"}' >"$work/kept.y4m.json"
    verify_record "by sora.c ?\[31m with the model ?x"
    head -c 1100000 /dev/zero >"$work/kept.y4m.json"
    verify_record ".*kept.y4m.json: longer than 1048576 bytes"
    rm "$work/kept.y4m.json"

    refused 2 "--verify $work/nowhere.y4m: No such file" --verify "$work/nowhere.y4m"
    refused 2 "--verify $work/prompt: .*this is not a Y4M file" --verify "$work/prompt"
    head -c 100000 "$work/kept.y4m" >"$work/torn.y4m"
    refused 2 "--verify $work/torn.y4m: " --verify "$work/torn.y4m"
    head -c 60 "$work/kept.y4m" >"$work/torn.y4m"
    refused 2 "--verify $work/torn.y4m: " --verify "$work/torn.y4m"
    "$sora" $small -q --no-record -o "$work/kept.y4m" x
    run --verify "$work/kept.y4m"
    claim "--verify of neither mark nor record: status 1, not $status" [ $status -eq 1 ]
    claim "--verify: no mark" grep -q "^mark: none" "$work/out"
}

printf "a red fox" >"$work/prompt"
printf '\357\273\277a red fox\r\n' >"$work/prompt.bom"
printf '\377\376a\0 \0r\0e\0d\0 \0f\0o\0x\0' >"$work/prompt.le"
printf '\376\377\0a\0 \0r\0e\0d\0 \0f\0o\0x' >"$work/prompt.be"
usage
input
resources
not_finite
streams
generation
seeds
noise
embeds
checks
options
information
building
chunks
pictures
quicker
images
resuming
demo
failures
trust
