# Flattens one JSON document into lines "path<TAB>value", the path's parts joined by "/", arrays counted from 0:
#   {"a": [{"b": "c"}]}   gives   a/0/b<TAB>c
# Every array and object also gives "path/#<TAB>length". In values a newline is written \n, a tab \t, a backslash \\.
# Exits 1 on what is no JSON. Strict enough for config drives, which are written by programs; RFC 8259.

function fail(why) { print "json: " why " at character " at > "/dev/stderr"; bad = 1; exit 1 }

function blank() { while (index(" \t\r\n", substr(text, at, 1)) && at <= size) at++ }

function utf8(code) {
    if (code < 128) return sprintf("%c", code)
    if (code < 2048) return sprintf("%c%c", 192 + int(code / 64), 128 + code % 64)
    if (code < 65536) return sprintf("%c%c%c", 224 + int(code / 4096), 128 + int(code / 64) % 64, 128 + code % 64)
    return sprintf("%c%c%c%c", 240 + int(code / 262144), 128 + int(code / 4096) % 64, 128 + int(code / 64) % 64, 128 + code % 64)
}

function hex4(    i, digit, code) {
    for (i = 0; i < 4; i++) {
        digit = index("0123456789abcdef", tolower(substr(text, at++, 1)))
        if (!digit) fail("bad \\u escape")
        code = code * 16 + digit - 1
    }
    return code
}

function escaped(    letter, code, low) {
    letter = substr(text, at++, 1)
    if (letter == "n") return "\\n"
    if (letter == "t") return "\\t"
    if (letter == "\\") return "\\\\"
    if (letter == "\"" || letter == "/") return letter
    if (letter == "r" || letter == "b" || letter == "f") return ""
    if (letter != "u") fail("bad escape")
    code = hex4()
    if (code >= 55296 && code < 56320 && substr(text, at, 2) == "\\u") {
        at += 2
        low = hex4()
        code = 65536 + (code - 55296) * 1024 + low - 56320
    }
    return code == 10 ? "\\n" : code < 32 ? "" : utf8(code)
}

function string(    value, piece) {
    at++
    for (;;) {
        if (!match(substr(text, at), /["\\]/)) fail("string without an end")
        value = value substr(text, at, RSTART - 1)
        at += RSTART
        piece = substr(text, at - 1, 1)
        if (piece == "\"") return value
        value = value escaped()
    }
}

function value(path,    first, count, key, rest) {
    blank()
    first = substr(text, at, 1)
    if (first == "{" || first == "[") {
        at++
        blank()
        if (substr(text, at, 1) == (first == "{" ? "}" : "]")) { at++; print path "#\t0"; return }
        for (;;) {
            if (first == "{") {
                blank()
                if (substr(text, at, 1) != "\"") fail("a key was expected")
                key = string()
                blank()
                if (substr(text, at++, 1) != ":") fail("a colon was expected")
                value(path key "/")
            } else value(path count + 0 "/")
            count++
            blank()
            rest = substr(text, at++, 1)
            if (rest == (first == "{" ? "}" : "]")) { print path "#\t" count; return }
            if (rest != ",") fail("a comma was expected")
        }
    }
    sub(/\/$/, "", path)
    if (first == "\"") { print path "\t" string(); return }
    if (!match(substr(text, at), /^(-?[0-9][-+.0-9eE]*|true|false|null)/)) fail("a value was expected")
    rest = substr(text, at, RLENGTH)
    at += RLENGTH
    print path "\t" (rest == "null" ? "" : rest)
}

{ text = text (NR > 1 ? "\n" : "") $0 }

END {
    if (bad) exit 1
    size = length(text)
    at = 1
    value("")
    blank()
    if (at <= size) fail("more text after the value")
}
