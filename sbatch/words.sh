# shellcheck shell=bash
# Lists in variables, for job.sh and pipeline.sh. The environment holds no arrays, so a list is given as its words.

# Make an array of each of these variables: its words, with any white space between them, line breaks too. No word is
# taken as a pattern.
words() { # VARIABLE ...
    local name text
    for name in "$@"; do
        local -n list=$name
        text="${list[*]}"
        read -ra list <<<"${text//[[:space:]]/ }"
        ((${#list[@]})) || { echo "error: $name holds nothing but blanks" >&2; exit 1; }
        [[ ${#list[@]} == 1 || ! -e $text ]] ||
            { echo "error: $name: '$text' is one path, but a list's words end at white space" >&2; exit 1; }
    done
}
