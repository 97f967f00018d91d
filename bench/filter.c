/* A milter filter that costs next to nothing: it wants every event and answers each.
 *
 *     cc -O2 -o filter filter.c -lmilter -lpthread;  ./filter SOCKET read|header|body
 *
 * read: changes nothing, and negotiates no right to. header: adds one field at the end of the message.
 * body: gives it a new body as long as the old one.
 */
#include <libmilter/mfapi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static enum { READ, HEADER, BODY } mode;
static unsigned char piece[65520]; /* whole lines of 65 octets */

static sfsistat on_connect(SMFICTX *ctx, char *host, _SOCK_ADDR *address)
{
    (void) host, (void) address;
    size_t *length = calloc(1, sizeof *length);
    if (length == NULL)
        return SMFIS_TEMPFAIL;
    smfi_setpriv(ctx, length);
    return SMFIS_CONTINUE;
}

static sfsistat on_helo(SMFICTX *ctx, char *name)
{
    (void) ctx, (void) name;
    return SMFIS_CONTINUE;
}

static sfsistat on_mail(SMFICTX *ctx, char **arguments)
{
    (void) arguments;
    *(size_t *) smfi_getpriv(ctx) = 0;
    return SMFIS_CONTINUE;
}

static sfsistat on_rcpt(SMFICTX *ctx, char **arguments)
{
    (void) ctx, (void) arguments;
    return SMFIS_CONTINUE;
}

static sfsistat on_data(SMFICTX *ctx)
{
    (void) ctx;
    return SMFIS_CONTINUE;
}

static sfsistat on_header(SMFICTX *ctx, char *name, char *value)
{
    (void) ctx, (void) name, (void) value;
    return SMFIS_CONTINUE;
}

static sfsistat on_body(SMFICTX *ctx, unsigned char *data, size_t length)
{
    (void) data;
    *(size_t *) smfi_getpriv(ctx) += length;
    return SMFIS_CONTINUE;
}

static sfsistat on_end(SMFICTX *ctx)
{
    size_t left = mode == BODY ? *(size_t *) smfi_getpriv(ctx) : 0;
    if (mode == HEADER && smfi_addheader(ctx, "X-Filtered", "yes") != MI_SUCCESS)
        return SMFIS_TEMPFAIL;
    while (left > 0) {
        size_t length = left < sizeof piece ? left : sizeof piece;
        if (smfi_replacebody(ctx, piece, (int) length) != MI_SUCCESS)
            return SMFIS_TEMPFAIL;
        left -= length;
    }
    return SMFIS_CONTINUE;
}

static sfsistat on_close(SMFICTX *ctx)
{
    free(smfi_getpriv(ctx));
    smfi_setpriv(ctx, NULL);
    return SMFIS_CONTINUE;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    mode = strcmp(argv[2], "header") == 0 ? HEADER : strcmp(argv[2], "body") == 0 ? BODY : READ;
    for (size_t i = 0; i < sizeof piece; i++)
        piece[i] = i % 65 == 63 ? '\r' : i % 65 == 64 ? '\n' : 'y';
    struct smfiDesc filter = {
        .xxfi_name = "bench",
        .xxfi_version = SMFI_VERSION,
        .xxfi_flags = mode == HEADER ? SMFIF_ADDHDRS : mode == BODY ? SMFIF_CHGBODY : SMFIF_NONE,
        .xxfi_connect = on_connect,
        .xxfi_helo = on_helo,
        .xxfi_envfrom = on_mail,
        .xxfi_envrcpt = on_rcpt,
        .xxfi_data = on_data,
        .xxfi_header = on_header,
        .xxfi_eoh = on_data,
        .xxfi_body = on_body,
        .xxfi_eom = on_end,
        .xxfi_close = on_close,
    };
    umask(0); /* Postfix is another user */
    if (smfi_setconn(argv[1]) != MI_SUCCESS || smfi_register(filter) != MI_SUCCESS)
        return 1;
    return smfi_main() == MI_SUCCESS ? 0 : 1;
}
