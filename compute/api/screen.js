// A guest's screen. Its address's end says which, and has a ticket that opens it once; both are forgotten at once.
import RFB from './core/rfb.js';

const [uuid, ticket] = location.hash.slice(1).split(/\.(.*)/);
history.replaceState(null, '', location.pathname);
const [keys, said, screen] = ['keys', 'said', 'screen'].map(id => document.getElementById(id));

function say(text) {
    said.textContent = text;
    keys.disabled = text !== '';
}

function open() {
    const url = new URL(`instances/${encodeURIComponent(uuid)}/streams/vnc`, location.href);
    url.protocol = url.protocol.replace('http', 'ws');
    const socket = new WebSocket(url, ['sf', `ticket.${ticket}`]);
    socket.binaryType = 'arraybuffer';
    let why = 'the connection ended; sf instance vnc opens another';
    socket.addEventListener('message', event => {
        if (typeof event.data === 'string') { // why it ends; to noVNC a text is nothing
            const { error, hint } = JSON.parse(event.data);
            why = error ? `${error}${hint ? ` (${hint})` : ''}` : why;
            socket.close();
        }
    });
    socket.addEventListener('close', () => say(why));
    socket.addEventListener('open', () => {
        const rfb = new RFB(screen, socket);
        rfb.scaleViewport = true;
        rfb.addEventListener('connect', () => { say(''); rfb.focus(); });
        rfb.addEventListener('desktopname', event => { document.title = event.detail.name; });
        keys.addEventListener('click', () => { rfb.sendCtrlAltDel(); rfb.focus(); });
        socket.send('{}'); // what is wanted of the stream; only then does the guest's side speak
    });
}

addEventListener('hashchange', () => location.reload()); // another address in the same tab
document.documentElement.style.cssText = 'height: 100%; background: #222; color: #eee; font: 14px sans-serif';
document.body.style.cssText = 'height: 100%; margin: 0; display: flex; flex-direction: column';
keys.style.alignSelf = 'flex-start';
screen.style.cssText = 'flex: 1; min-height: 0';
if (uuid && ticket) open(); else say('nothing to show: sf instance vnc NAME prints an address that does');
