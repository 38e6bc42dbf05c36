/* A 9P2000.L client that measures a server over a Unix socket: several connections, each with one
 * request under way, as that many programs that wait for each answer. socketbench.py compiles it.
 *
 *     socketclient SOCKET ANAME WORKLOAD CONNECTIONS COUNT NAME
 *
 * write: each connection makes a file NAME-N, open with O_SYNC, and writes COUNT blocks of 4 KiB one
 * after the other. walk: each walks COUNT times to the file NAME, asks for its attributes and clunks
 * the fid. One line of JSON says how long it took from the first of these requests to the last
 * answer, and what this process used: seconds, user, system. Anything unexpected ends it with 1. */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { Tlcreate = 14, Tgetattr = 24, Rlerror = 7, Tversion = 100, Tattach = 104, Twalk = 110,
       Twrite = 118, Tclunk = 120 };
enum { BLOCK = 4096, MSIZE = 65536, MOST = 256, ROOT = 1, FILE_FID = 2, NOFID = -1,
       BASIC = 0x7ff };

struct connection {
    int fd;
    uint8_t out[BLOCK + 256], in[MSIZE];
    size_t length, got;
    long done;
    int stage;
};

static struct connection connections[MOST];

static void die(const char *what) {
    fprintf(stderr, "socketclient: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void put(struct connection *c, uint64_t value, int bytes) {
    for (; bytes; bytes--, value >>= 8) c->out[c->length++] = value & 0xff;
}

static void put_string(struct connection *c, const char *text) {
    put(c, strlen(text), 2);
    memcpy(c->out + c->length, text, strlen(text));
    c->length += strlen(text);
}

static void begin(struct connection *c, int type) {
    c->length = 4;
    put(c, type, 1);
    put(c, type == Tversion ? 0xffff : 0, 2);
}

static void send_all(struct connection *c) {
    size_t whole = c->length;
    c->length = 0;
    put(c, whole, 4);
    for (size_t sent = 0; sent < whole;) {
        ssize_t count = write(c->fd, c->out + sent, whole - sent);
        if (count < 0) die("write");
        sent += count;
    }
    c->got = 0;
}

/* Take in what is there; whether the answer is whole. One that is no answer to the type ends it. */
static int receive(struct connection *c) {
    ssize_t count = read(c->fd, c->in + c->got, sizeof c->in - c->got);
    if (count <= 0) die(count ? "read" : "the server has gone");
    c->got += count;
    uint32_t size;
    if (c->got < 7) return 0;
    memcpy(&size, c->in, 4);
    if (size > sizeof c->in) die("an answer that is too large");
    if (c->got < size) return 0;
    if (c->in[4] != c->out[4] + 1) {
        errno = c->in[4] == Rlerror ? c->in[7] | c->in[8] << 8 : EPROTO;
        die("a request failed");
    }
    return 1;
}

static void ask(struct connection *c) {
    send_all(c);
    while (!receive(c)) {}
}

static void connect_to(struct connection *c, const char *path, const char *aname) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || connect(c->fd, (void *)&address, sizeof address)) die(path);
    begin(c, Tversion);
    put(c, MSIZE, 4);
    put_string(c, "9P2000.L");
    ask(c);
    begin(c, Tattach);
    put(c, ROOT, 4);
    put(c, (uint32_t)NOFID, 4);
    put_string(c, "root");
    put_string(c, aname);
    put(c, geteuid(), 4);
    ask(c);
}

static void walk(struct connection *c, const char *name) {
    begin(c, Twalk);
    put(c, ROOT, 4);
    put(c, FILE_FID, 4);
    put(c, name != NULL, 2);
    if (name) put_string(c, name);
}

static void create(struct connection *c, const char *name) {
    walk(c, NULL);
    ask(c);
    begin(c, Tlcreate);
    put(c, FILE_FID, 4);
    put_string(c, name);
    put(c, 01 | 0100 | 04010000, 4); /* O_WRONLY, O_CREAT, O_SYNC, as Linux has them on x86 */
    put(c, 0644, 4);
    put(c, getegid(), 4);
    ask(c);
}

static void send_block(struct connection *c) {
    begin(c, Twrite);
    put(c, FILE_FID, 4);
    put(c, (uint64_t)c->done * BLOCK, 8);
    put(c, BLOCK, 4);
    c->length += BLOCK; /* what it holds does not matter */
    send_all(c);
}

/* A walk, a getattr and a clunk: the next of them. */
static void send_step(struct connection *c, const char *name) {
    if (c->stage == 0) walk(c, name);
    else {
        begin(c, c->stage == 1 ? Tgetattr : Tclunk);
        put(c, FILE_FID, 4);
        if (c->stage == 1) put(c, BASIC, 8);
    }
    send_all(c);
}

static double seconds_of(struct timeval t) { return t.tv_sec + t.tv_usec / 1e6; }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    int writes = !strcmp(argv[3], "write"), count = atoi(argv[4]);
    long each = atol(argv[5]);
    const char *name = argv[6];
    if (count < 1 || count > MOST) return 2;
    struct pollfd polled[MOST];
    for (int n = 0; n < count; n++) {
        struct connection *c = connections + n;
        connect_to(c, argv[1], argv[2]);
        if (writes) {
            char own[256];
            snprintf(own, sizeof own, "%s-%d", name, n);
            create(c, own);
        }
        polled[n] = (struct pollfd){.fd = c->fd, .events = POLLIN};
    }
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    double start = now();
    for (int n = 0; n < count; n++)
        writes ? send_block(connections + n) : send_step(connections + n, name);
    for (int left = count; left;) {
        if (poll(polled, count, 30000) <= 0) die("no answer");
        for (int n = 0; n < count; n++) {
            struct connection *c = connections + n;
            if (!polled[n].revents || !receive(c)) continue;
            c->stage = writes ? 0 : (c->stage + 1) % 3;
            if (!c->stage && ++c->done == each) {
                polled[n].fd = -1;
                left--;
            } else
                writes ? send_block(c) : send_step(c, name);
        }
    }
    double end = now();
    getrusage(RUSAGE_SELF, &after);
    printf("{\"seconds\": %.6f, \"user\": %.6f, \"system\": %.6f}\n", end - start,
           seconds_of(after.ru_utime) - seconds_of(before.ru_utime),
           seconds_of(after.ru_stime) - seconds_of(before.ru_stime));
    return 0;
}
