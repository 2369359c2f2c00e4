// What is pointed at lights up what it is linked with; what is chosen can be changed. Runs once, inside gr.HTML.
const state = {answer: null, slot: null, chosen: null, turn: 0, asked: null, waiting: 0, told: null, other: null};
const all = (selector, root) => [...(root || element).querySelectorAll(selector)];
const active = () => element.querySelector('.slot:not([hidden])');
const numbers = node => (node.dataset.c || '').split(' ').filter(Boolean);

function light(fired) {
  const root = element.querySelector('.why'), section = active();
  if (!root || !section) return;
  root.classList.toggle('lighting', fired.length > 0);
  for (const node of all('[data-c]', section))
    node.classList.toggle('lit', numbers(node).some(number => fired.includes(number)));
  const caption = section.querySelector('.place');
  if (!caption) return;
  const rows = all('.concept[data-c]', section).filter(row => fired.includes(row.dataset.c));
  caption.textContent = rows.length
    ? 'only ' + rows.map(row => `${row.dataset.name} (${row.dataset.share})`).join(', ')
    : caption.dataset.all;
}

function choose(number) {
  if (number !== state.chosen) state.other = null;
  state.chosen = number;
  for (const row of all('.concept[data-c]')) {
    const chosen = row.dataset.c === number && !row.closest('[hidden]');
    row.setAttribute('aria-pressed', chosen);
    if (!chosen) continue;
    for (const name of all('.chosen')) name.textContent = row.dataset.name;
    for (const about of all('.about-chosen')) about.textContent = row.dataset.about;
    offer(row);
  }
  foretell();
}

// What the chosen concept could be changed to is tried on the way, once for each answer and its changes, one at a time.
function foretell() {
  const root = element.querySelector('.why'), asked = `${state.turn} ${state.chosen}`;
  tell();
  if (!root || root.dataset.foretells === undefined || state.chosen === null || state.asked === asked) return;
  if (Date.now() - state.waiting < 20000) return; // asked when the one before is there, or lost
  state.asked = asked;
  state.waiting = Date.now();
  trigger('foretell', {concept: Number(state.chosen), turn: state.turn});
}

function tell() {
  const box = element.querySelector('.foretold'), other = element.querySelector('.other'), told = state.told;
  if (!box) return;
  box.replaceChildren();
  const known = told && told.turn === state.turn && told.concept === Number(state.chosen);
  const found = known ? told.slots[state.slot] : null;
  if (!known) box.textContent = 'trying what each would do …';
  if (!found) return;
  const line = (what, does) => {
    const row = document.createElement('p'), strong = document.createElement('b');
    strong.textContent = does;
    row.append(`${what}: `, strong);
    box.append(row);
  };
  const named = label => [...(other ? other.options : [])].find(option => option.value === label)?.text ?? label;
  if (found.double) line('× 2', found.double);
  for (const [does, labels] of found.swaps) line(`→ ${labels.map(named).join(', ')}`, does);
  const [most] = found.swaps;
  if (other && most && state.other === null) other.value = most[1][0]; // what moves it most, unless one was chosen
}

// What can be done with the chosen concept: what is done already is undone, and nothing takes its own place.
function offer(row) {
  const {name, change} = row.dataset, other = element.querySelector('.other');
  for (const button of all('[data-do=off]')) button.textContent = change === '0' ? 'Switch on' : 'Switch off';
  for (const button of all('[data-do=double]')) button.textContent = change === '2' ? 'Undo double' : 'Double';
  if (!other) return;
  for (const option of other.options) option.hidden = option.disabled = option.value === name || option.value === change;
  if (state.other !== null) other.value = state.other;
  if (!other.selectedOptions.length || other.selectedOptions[0].disabled)
    other.value = ([...other.options].find(option => !option.disabled) || {value: ''}).value;
}

function show(slot) {
  state.slot = slot;
  for (const node of all('.slot[data-slot], .pair[data-slot], .note[data-slot]')) node.hidden = node.dataset.slot !== slot;
  for (const tab of all('.tab')) tab.setAttribute('aria-pressed', tab.dataset.slot === slot);
  const rows = all('.concept[data-c]', active() || element);
  const kept = rows.find(row => row.dataset.c === state.chosen) || rows[0];
  choose(kept ? kept.dataset.c : null);
  light([]);
}

function refresh() {
  const root = element.querySelector('.why');
  if (!root) return;
  computing(false);
  const begins = root.dataset.answer === '' && root.dataset.busy !== undefined;
  if (begins && !state.busy && element.getBoundingClientRect().top > 0.6 * window.innerHeight)
    element.scrollIntoView({block: 'start'});
  state.busy = begins;
  state.turn += 1;
  const slots = all('.tab').map(tab => tab.dataset.slot);
  if (root.dataset.answer !== state.answer) Object.assign(state, {answer: root.dataset.answer, slot: null, chosen: null});
  if (slots.length) show(slots.includes(state.slot) ? state.slot : slots[0]);
  const text = element.querySelector('.text');
  if (text && !root.dataset.answer) text.scrollTop = text.scrollHeight;
  if (element.contains(document.activeElement) && document.activeElement.dataset.c) light(numbers(document.activeElement));
}

// A change is on its way: said at once, and nothing else can be asked for until it is there.
function computing(on) {
  const root = element.querySelector('.why');
  if (!root) return;
  state.computing = on;
  root.classList.toggle('computing', on);
  root.setAttribute('aria-busy', on);
  for (const button of all('[data-do]')) button.setAttribute('aria-disabled', on); // `disabled` would lose the focus
}

function ask(event, given) {
  computing(true);
  const pair = element.querySelector('.pair:not([hidden])');
  if (pair) pair.scrollIntoView({block: 'nearest'}); // where the change will be seen; on a phone it is further down
  trigger(event, given);
}

function act(action, button) {
  if (state.computing) return;
  const other = element.querySelector('.other'), row = element.querySelector('.concept[aria-pressed=true]');
  if (action === 'undo') return ask('undo', {});
  if (action === 'drop') {
    ask('undo', {concept: Number(button.dataset.concept)});
    element.querySelector('[data-do=off]').focus({preventScroll: true}); // the button goes with its change
    return;
  }
  if (state.chosen === null || !row || (action === 'swap' && !other.value)) return;
  const concept = Number(state.chosen), done = {off: '0', double: '2'}[action];
  if (action === 'swap') state.other = null; // what is best next is another
  if (done !== undefined && row.dataset.change === done) return ask('undo', {concept});
  ask('steer', {action, concept, other: other ? other.value : null});
}

// The concept that a word stands for: the one of its name, else the heaviest that it fires.
function meant(word) {
  const fired = numbers(word), rows = all('.concept[data-c]', active()).filter(row => fired.includes(row.dataset.c));
  return (rows.find(row => row.dataset.name === word.textContent.trim()) || rows[0]).dataset.c;
}

function spot(event) {
  const picture = event.target.closest('[data-spots]');
  if (!picture) return null;
  const spots = JSON.parse(picture.dataset.spots), frame = picture.querySelector('svg');
  const photo = frame.querySelector('use').getBoundingClientRect();
  if (!spots.length || !photo.width || !photo.height) return null;
  const x = (event.clientX - photo.left) / photo.width, y = (event.clientY - photo.top) / photo.height;
  if (x < 0 || y < 0 || x >= 1 || y >= 1) return null;
  const number = spots[Math.floor(y * spots.length)][Math.floor(x * spots[0].length)];
  return number < 0 ? null : String(number);
}

function point(event) {
  const linked = event.target.closest('button[data-c]'), place = spot(event);
  light(linked ? numbers(linked) : place === null ? [] : [place]);
}

element.addEventListener('pointermove', point);
element.addEventListener('pointerdown', point);
element.addEventListener('pointerleave', () => light([]));
element.addEventListener('focusin', event => {
  const linked = event.target.closest('button[data-c]');
  light(linked ? numbers(linked) : []);
});
element.addEventListener('focusout', () => light([]));
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.classList.contains('tab')) return show(button.dataset.slot);
  if (button.classList.contains('concept')) return choose(button.dataset.c);
  if (button.classList.contains('word') && numbers(button).length) return choose(meant(button));
  if (button.dataset.do) act(button.dataset.do, button);
});
element.addEventListener('change', event => {
  if (event.target.closest('.other')) state.other = event.target.value;
});
element.addEventListener('told', event => {
  state.told = event.detail;
  state.waiting = 0;
  foretell();
});
element.addEventListener('computing', () => computing(true));
element.addEventListener('settled', () => computing(false));
watch('value', refresh);
refresh();
