/* fuzz_options.c - command lines and config files: arguments a line each, an empty line, the file. */
#include "server/options.h"
#include "tests/fuzz.h"

static const struct opt table[] = {
    { "base", 'b', "FILE", NULL, "a file", false },
    { "port", 'p', "N", "8080", "a number", false },
    { "ratio", 0, "X", "0.5", "a fraction", false },
    { "memory", 'm', "SIZE", NULL, "a size", false },
    { "adapter", 'a', "NAME", NULL, "more than one", true },
    { "verbose", 'v', NULL, NULL, "a flag", false },
    { 0 },
};

static void read_all(const struct opts *o)
{
    int64_t n;
    double x;
    if (opt_int(o, "port", 1, 65535, &n))
        law(n >= 1 && n <= 65535, "an integer is in range");
    if (opt_double(o, "ratio", 0, 1, &x))
        law(x >= 0 && x <= 1, "a number is in range");
    if (opt_bytes(o, "memory", &n))
        law(n >= 0, "a size is not negative");
    opt_flag(o, "verbose");
    for (size_t i = 0; i < opt_count(o, "adapter"); i++)
        law(opt_nth(o, "adapter", i) != NULL, "every value is there");
    for (int i = 0; i < opts_nargs(o); i++)
        law(opts_arg(o, i) != NULL, "every argument is there");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    enum { ARGS = 16 };
    char *text = fuzz_text(data, len);
    char *file = memmem(text, len, "\n\n", 2);
    const size_t nfile = file != NULL ? len - (size_t)(file + 2 - text) : 0;
    struct fuzz_file f = fuzz_file(file != NULL ? file + 2 : NULL, nfile);
    char *argv[ARGS + 3] = { "fuzz", "--config", f.path };
    int argc = 3, code = -1;
    if (file != NULL)
        *file = '\0';
    for (char *save, *s = strtok_r(text, "\n", &save); s != NULL && argc < ARGS + 2;
         s = strtok_r(NULL, "\n", &save))
        argv[argc++] = s;
    struct opts *o = opts_parse(argc, argv, table, "fuzz [options]", NULL, 0, 4, &code);
    if (o != NULL)
        read_all(o);
    else
        law(code == 0 || code == 2, "a refusal has its exit code");
    opts_free(o);
    close(f.fd);
    free(text);
    return 0;
}
