// What is pointed at lights up what it is linked with; what is chosen can be changed. Runs once, inside gr.HTML.
const state = {answer: null, slot: null, chosen: null};
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
  state.chosen = number;
  for (const row of all('.concept[data-c]')) {
    const chosen = row.dataset.c === number && !row.closest('[hidden]');
    row.setAttribute('aria-pressed', chosen);
    if (!chosen) continue;
    for (const name of all('.chosen')) name.textContent = row.dataset.name;
    const other = element.querySelector('.other');
    if (other && other.value === row.dataset.name)
      other.value = ([...other.options].find(option => option.value !== other.value) || other).value;
  }
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
  const begins = root.dataset.answer === '' && root.dataset.busy !== undefined;
  if (begins && !state.busy && element.getBoundingClientRect().top > 0.6 * window.innerHeight)
    element.scrollIntoView({block: 'start'});
  state.busy = begins;
  const slots = all('.tab').map(tab => tab.dataset.slot);
  if (root.dataset.answer !== state.answer) Object.assign(state, {answer: root.dataset.answer, slot: null, chosen: null});
  if (slots.length) show(slots.includes(state.slot) ? state.slot : slots[0]);
  const text = element.querySelector('.text');
  if (text && !root.dataset.answer) text.scrollTop = text.scrollHeight;
  if (element.contains(document.activeElement) && document.activeElement.dataset.c) light(numbers(document.activeElement));
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
  if (button.classList.contains('word') && numbers(button).length) return choose(numbers(button)[0]);
  if (button.dataset.do === 'undo') return trigger('undo', {});
  if (button.dataset.do && state.chosen !== null) {
    const other = element.querySelector('.other');
    trigger('steer', {action: button.dataset.do, concept: Number(state.chosen), other: other ? other.value : null});
  }
});
watch('value', refresh);
refresh();
